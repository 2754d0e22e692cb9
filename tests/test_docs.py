import argparse
import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ssod_imwa.config.naming import output_folder
from ssod_imwa.papers.tables import read_table
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import read_results

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
TABLES = sorted((ROOT / "configs/tables").glob("*.yaml"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_readme_loop_runs_and_says_what_it_does(capsys):
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"episode {e}" for e in range(1, 5)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    named = set(
        re.findall(
            r"(?<![\w/])(?:tools|configs|examples|benchmarks|tests)/[\w/]+\.\w+", page.read_text()
        )
    )
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_explains_itself(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool.name, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    assert caught.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert tool.name in (ROOT / "README.md").read_text() + (ROOT / "docs/datasets.md").read_text()


def options_of(tool, monkeypatch):
    """The options of a tool's parser, in full: argparse would take `--perc` for `--percent`."""

    def stop(parser, *arguments):
        subjects = [
            subject
            for action in parser._actions
            if isinstance(action, argparse._SubParsersAction)
            for subject in action.choices.values()
        ]
        raise LookupError("".join(p.format_usage() for p in (parser, *subjects)))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(LookupError) as usage:
            runpy.run_path(str(tool))["parse_arguments"]()
    return set(re.findall(r"--[a-z][\w-]*", str(usage.value)))


def commands(text):
    """Name and options of each command line of a tool that stands in a text."""
    for name, rest in re.findall(r"\b(\w+)\.py((?:[^\S\n]+[^\s`|]+)*)", text):
        yield name, set(re.findall(r"(?<=\s)--[a-z][\w-]*", rest))


TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in (*PAGES, ROOT / "Makefile")} | {
    tool.name: ast.get_docstring(ast.parse(tool.read_text())).replace("%(prog)s", tool.name)
    for tool in TOOLS
}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_command_lines_in_texts_use_options_that_the_tool_has(tool, monkeypatch):
    known = options_of(tool, monkeypatch)
    for text, content in TEXTS.items():
        for name, options in commands(content):
            assert name != tool.stem or options <= known, text


def test_command_lines_are_found():
    found = dict(commands(TEXTS["README.md"]))
    assert {"train_net", "prepare_splits", "visualize", "export"} <= found.keys()
    assert found["prepare_splits"] == {"--percent", "--output"}
    assert ("average_checkpoints", {"--rule", "--dataset"}) in [
        (name, options) for name, options in commands(TEXTS["average_checkpoints.py"])
    ]


def training_commands(text):
    """Arguments of each command of train_net.py or reproduce.py that names its files in full."""
    fences = re.findall(r"```.*?```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = "\n".join(fences or [text]).replace("\\\n", " ").splitlines()
    for line in [*lines, *(" ".join(code.split()) for code in inline)]:
        call = re.search(r"\b(train_net|reproduce)\.py((?: --[\w-]+)*\s+configs/[^#]*)", line)
        if call and "$" not in call[2]:
            yield call[1], shlex.split(call[2])


def configurations(tool, arguments, monkeypatch):
    """Load all that a command trains."""
    monkeypatch.setattr("sys.argv", [f"{tool}.py", *arguments])
    parsed = runpy.run_path(str(ROOT / f"tools/{tool}.py"))["parse_arguments"]()
    if tool == "train_net":
        return [load_config(parsed.config_file, parsed.overrides)]
    runs = read_table(parsed.table).runs.values()
    return [load_config(run.config, [*run.overrides, *parsed.overrides]) for run in runs]


@pytest.mark.parametrize("text", TEXTS)
def test_commands_in_texts_name_files_and_settings_that_load(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    for tool, arguments in training_commands(TEXTS[text]):
        if not any("detectron2" in argument for argument in arguments):
            assert configurations(tool, arguments, monkeypatch)


def test_compositions_with_one_output_folder_are_the_same_recipe():
    """Those of texts and tables alike: two recipes must not meet in a folder."""
    runs = [run for path in TABLES for run in read_table(path).runs.values()]
    compositions = {
        tuple(str(path.resolve().relative_to(ROOT)) for path in run.config) for run in runs
    }
    for text in TEXTS.values():
        for tool, arguments in training_commands(text):
            if tool == "train_net":
                compositions.add(tuple(name for name in arguments if name.endswith(".yaml")))
    folders = defaultdict(list)
    for files in compositions:
        folders[output_folder(files)].append([ROOT / name for name in files])
    assert len(folders) > 100
    for folder, recipes in folders.items():
        if len(recipes) > 1:
            assert len({load_config(files).dump() for files in recipes}) == 1, folder


def test_training_commands_are_found():
    readme = list(training_commands(TEXTS["README.md"]))
    files = ("coco/unbiased_teacher", "coco/10pct", "averaging/imwa")
    coco = ["--config-file", *(f"configs/{name}.yaml" for name in files)]
    assert readme[:2] == [
        ("train_net", ["--config-file", "configs/digits/unbiased_teacher.yaml"]),
        ("train_net", coco),
    ]
    assert ("reproduce", ["configs/tables/digits_demo.yaml"]) in readme
    results = list(training_commands(TEXTS["docs/results.md"]))
    assert len(results) > 7
    assert ("reproduce", ["configs/tables/voc_mini.yaml"]) in results


@pytest.mark.parametrize(
    "target", ["demo", "compare", "demo-classification", "demo-semi", "test", "test-all"]
)
def test_make_targets_name_files_that_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"(?:tools|configs)/[\w/$}{#]+\.\w+", done.stdout)
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("target", ["demo", "compare"])
def test_make_shows_the_folders_that_its_recipes_are_named_after(target, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    trained = [
        cfg.OUTPUT_DIR
        for tool, arguments in training_commands(done.stdout)
        for cfg in configurations(tool, arguments, monkeypatch)
    ]
    assert trained
    assert set(re.findall(r"output/\w+", done.stdout)) == set(trained)


# Settings with which the commands of a page end in seconds.
SHORT_BIRDS = {
    "classification": "CLS.SCHEDULE.EPOCHS 1",
    "semi_supervised_classification": "SOLVER.MAX_ITER 1 TEST.EVAL_PERIOD 0 SOLVER.IMS_PER_BATCH 4 "
    "SOLVER.IMS_PER_BATCH_UNLABELED 4 CLS.INPUT.SIZE 16",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", SHORT_BIRDS)
def test_the_commands_for_own_images_train(page, tmp_path, monkeypatch):
    (block,) = (x for x in blocks(ROOT / f"docs/{page}.md", "bash") if "folder:birds" in x)
    for split, counts in (("train", (40, 20, 4)), ("test", (3, 3, 3)), ("unlabeled", (9, 9, 9))):
        for species, count in zip(("crow", "gull", "kiwi"), counts, strict=True):
            folder = tmp_path / "birds" / split / species
            folder.mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((60, 40), 50).convert("RGB").save(folder / f"{i}.jpg")
    block = block.replace("OUTPUT_DIR", f"{SHORT_BIRDS[page]} OUTPUT_DIR")
    block = block.replace("python tools/", f"{sys.executable} {ROOT}/tools/")
    block = block.replace(" configs/", f" {ROOT}/configs/")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, check=True)
    assert "top1" in read_results(tmp_path / "output/birds").headline().metrics


# ------------------------------------------------------------------------------ your_own_data.md

OWN_DATA = ROOT / "docs/your_own_data.md"
SHORT = {
    "MAX_ITER: 200": "MAX_ITER: 4",
    "MAX_ITER: 400": "MAX_ITER: 6",
    "MAX_ITER: 300": "MAX_ITER: 4",
    "BURN_IN_ITERS: 200 ": "BURN_IN_ITERS: 3 ",
    "EPOCHS: 6, WARMUP: 0.5": "EPOCHS: 1, WARMUP: 0.5",
    "IMS_PER_BATCH: 128": "IMS_PER_BATCH: 8",
}


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The page's YAML files beside `configs`, as the page says; they are the working folder's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    for text in blocks(OWN_DATA, "yaml"):
        (tmp_path / re.match(r"# (\S+\.yaml)\n", text)[1]).write_text(text)
    return tmp_path


def test_the_files_for_own_data_load_also_as_the_page_changes_them_for_a_gpu(own_files):
    tasks = {path.stem: load_config(path).TASK for path in sorted(own_files.glob("*.yaml"))}
    boxes = dict.fromkeys(("cells", "photos", "street"), "detection")
    assert tasks == {**boxes, "things": "classification"}
    assert load_config("photos.yaml").SSOD.ALGORITHM == "unbiased_teacher"
    for name in ("cells", "street"):
        tree = yaml.safe_load((own_files / f"{name}.yaml").read_text())
        del tree["_BASE_"][0], tree["INPUT"]
        (own_files / "gpu.yaml").write_text(
            yaml.safe_dump({**tree, "MODEL": {"WEIGHTS": "imagenet"}})
        )
        cfg = load_config("gpu.yaml")
        assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == ("imagenet", 50)
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.BACKBONE.NAME) == (800, "resnet")
    page = OWN_DATA.read_text()
    for setting in ("MODEL: {WEIGHTS: imagenet}", "CLS: {MODEL: {NAME: resnet50}, INPUT"):
        assert setting in page
    photographs = "TASK: classification\nMODEL: {WEIGHTS: imagenet}\n"
    photographs += re.search(r"`(CLS: \{MODEL: .*?)`", page)[1]
    (own_files / "gpu.yaml").write_text(photographs)
    assert load_config("gpu.yaml").CLS.INPUT.SIZE == 224


def write_own_data(root):
    """A few images in the places and forms of the page."""

    def draw(path, size=(40, 30)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(path)

    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "other"}]
    for split, folder in (("train", "labeled"), ("test", "test")):
        images, boxes = [], []
        for i in range(4):
            draw(root / "cells" / folder / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30})
            box = {"id": i, "image_id": i, "category_id": i % 2 + 1, "bbox": [5, 5, 20, 20]}
            boxes.append(box)
        content = {"images": images, "annotations": boxes, "categories": categories}
        (root / f"cells/{split}.json").write_text(json.dumps(content))
    corners = "<xmin>5</xmin><ymin>5</ymin><xmax>25</xmax><ymax>25</ymax>"
    xml = f"<annotation><object><name>car</name><bndbox>{corners}</bndbox></object></annotation>"
    for place in ("Annotations", "ImageSets/Main"):
        (root / "street" / place).mkdir(parents=True)
    for i in range(4):
        draw(root / f"cells/photos/{i}.jpg")
        draw(root / f"street/JPEGImages/{i}.jpg")
        (root / f"street/Annotations/{i}.xml").write_text(xml)
        for kind in ("cup", "hat"):
            draw(root / f"things/train/{kind}/{i}.png", (32, 32))
            draw(root / f"things/test/{kind}/{i}.png", (32, 32))
    for split, names in (("train", "0\n1\n"), ("test", "2\n3\n")):
        (root / f"street/ImageSets/Main/{split}.txt").write_text(names)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2], ids=["COCO and photographs", "VOC", "classes"])
def test_the_commands_for_own_data_run_in_their_order(own_files, monkeypatch, number):
    block = [text for text in blocks(OWN_DATA, "bash") if "tools/" in text][number]
    write_own_data(own_files / "mine")
    page = OWN_DATA.read_text()
    for whole, short in SHORT.items():
        assert whole in page
        for path in own_files.glob("*.yaml"):
            path.write_text(path.read_text().replace(whole, short))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    block = block.replace("python tools/", f"{sys.executable} tools/")
    subprocess.run(["bash", "-e", "-c", block], check=True)
    written = [["pictures", "output/photos/pictures", "predictions", "cells.pth"]]
    written += [["pictures", "output/street/pictures", "street.pth"]]
    written += [["output/things/pictures", "things.pth"]]
    assert [name for name in written[number] if not (own_files / name).exists()] == []
