"""What docs/add_a_method.md adds, added to a copy of the package and trained."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/add_a_method.md").read_text()
# Source files that an addition touches; recipes and documentation come on top.
TOUCHED = {"A detection method": 2, "A classification method": 2, "A loss": 2, "A backbone": 2}
SHORT = ("SOLVER.MAX_ITER", 3, "CLS.SCHEDULE.EPOCHS", 0)
DIGITS = ("--config-file", ROOT / "configs/digit_images/cross_entropy.yaml", *SHORT)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def take_away(title, package):
    """Undo what a section adds, where the package has it; what the touched files were."""
    before = {}
    for name, _ in re.findall(r"```python\n# (\S+)\n(.*?)```", section(title), re.DOTALL):
        before[name] = (package / name).read_text()
        (package / name).unlink()
    for name, changes in re.findall(
        r"```diff\n--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)```", section(title), re.DOTALL
    ):
        before[name] = text = (package / name).read_text()
        for line in re.findall(r"^\+(.*\n)", changes, re.MULTILINE):
            assert text.count(line) == 1, f"{name} has no line {line!r}"
            text = text.replace(line, "")
        (package / name).write_text(text)
    return before


def add(title, package):
    """Write a section's files and apply its changes; the files that were touched."""
    touched = []
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", section(title), re.DOTALL):
        (package / name).write_text(code)
        touched.append(name)
    for name, changes in re.findall(
        r"```diff\n--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)```", section(title), re.DOTALL
    ):
        text = (package / name).read_text()
        for hunk in changes.split("@@ ")[1:]:
            before, *lines = hunk.splitlines()
            assert text.count(f"{before}\n") == 1, f"{name} has no line {before!r}"
            added = "".join(f"{line[1:]}\n" for line in lines)
            text = text.replace(f"{before}\n", f"{before}\n{added}")
        (package / name).write_text(text)
        touched.append(name)
    return touched


@pytest.fixture
def package(tmp_path):
    for folder in ("ssod_imwa", "tools", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=ignore)
    return tmp_path / "copy"


def run(package, tool, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"tools/{tool}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_page_shows_the_detection_method_that_the_package_has():
    ((name, code),) = re.findall(
        r"```python\n# (\S+)\n(.*?)```", section("A detection method"), re.DOTALL
    )
    assert code == (ROOT / name).read_text(), "copy the file into docs/add_a_method.md"


def test_a_detection_method_is_added_by_two_files_and_trains_under_imwa(package, detection_config):
    before = take_away("A detection method", package)
    detector = ("--config-file", "configs/models/faster_rcnn_r18_fpn_small.yaml")
    status, _, err = run(package, "train_net", *detector, "SSOD.ALGORITHM", "mean_teacher")
    assert status == 2
    assert "SSOD.ALGORITHM = 'mean_teacher' is not allowed" in err
    assert len(add("A detection method", package)) == TOUCHED["A detection method"]
    # Lines of other methods may stand between its own.
    for name, text in before.items():
        assert sorted((package / name).read_text().splitlines()) == sorted(text.splitlines())
    cfg = detection_config()
    settings = ["DATASETS.ROOT", cfg.DATASETS.ROOT, "DATASETS.TRAIN", cfg.DATASETS.TRAIN]
    settings += ["DATASETS.TEST", cfg.DATASETS.TEST, "DATASETS.SPLIT.PERCENT", 50]
    settings += ["SOLVER.MAX_ITER", 2, "INPUT.MIN_SIZE_TRAIN", [48], "INPUT.MIN_SIZE_TEST", 48]
    settings += ["SSOD.ALGORITHM", "mean_teacher", "SSOD.RAMPUP_ITERS", 1]
    recipe = ("configs/models/faster_rcnn_r18_fpn_small.yaml", "configs/averaging/imwa.yaml")
    status, out, err = run(
        *(package, "train_net", "--config-file", *recipe, *settings),
        *("IMWA.EPISODES", 2, "OUTPUT_DIR", "out", "DATALOADER.NUM_WORKERS", 0),
    )
    assert status == 0, err
    assert "teacher" in out
    assert "`SSOD.RAMPUP_ITERS`" in run(package, "keys")[1]
    status, _, err = run(
        *(package, "train_net", "--config-file", recipe[0], "SSOD.RAMPUP_ITERS", 1),
    )
    assert status == 2
    assert "mean_teacher" in err


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        (
            "A classification method",
            ("CLS.ALGORITHM", "confidence_penalty", "CLS.CONFIDENCE_PENALTY.BETA", 0.2),
        ),
        ("A loss", ("CLS.LOSS.NAME", "poly", "CLS.LOSS.EPSILON", 0.5)),
        ("A backbone", ("CLS.MODEL.NAME", "small_net")),
    ],
)
def test_what_is_added_to_classification_trains(package, title, settings):
    assert len(add(title, package)) == TOUCHED[title]
    # A recipe names the method and loss that these settings replace.
    base = DIGITS if title != "A classification method" else (DIGITS[0], base_of_digits(), *SHORT)
    status, out, err = run(package, "train_net", *base, *settings, "OUTPUT_DIR", "out")
    assert status == 0, err
    assert "top1" in out


def base_of_digits():
    return ROOT / "configs/digit_images/base.yaml"


def test_a_registered_data_set_trains(package):
    (code,) = re.findall(r"```python\n# my_sets.py\n(.*?)```", section("A data set"), re.DOTALL)
    (package / "my_sets.py").write_text(code)
    sets = ("DATASETS.IMPORT", ["my_sets"], "DATASETS.TRAIN", ["my_digits"])
    status, _, err = run(package, "train_net", *DIGITS, *sets, "OUTPUT_DIR", "out")
    assert status == 0, err
