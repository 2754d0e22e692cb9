"""The readers of docs/datasets.md, "Readers of your own", from every command line."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.classification.data import catalog as image_catalog
from ssod_imwa.detection.data import catalog
from ssod_imwa.runs.results import read_results

ROOT = Path(__file__).parents[2]
COMMON = ("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 2)
SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("INPUT.MIN_SIZE_TRAIN", [40], "INPUT.MIN_SIZE_TEST", 40, "SOLVER.IMS_PER_BATCH", 2),
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The module of the page on the path, and the data that it reads."""
    page = (ROOT / "docs/datasets.md").read_text()
    (module,) = re.findall(r"```python\n(# my_data.py.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_data.py").write_text(module)
    (tmp_path / "birds").mkdir()
    for split, count in (("train", 6), ("test", 4)):
        lines = []
        for i in range(count):
            pixels = np.full((40, 40, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"birds/{split}{i}.png")
            lines.append(f"{split}{i}.png,5,5,30,25,{('crow', 'gull')[i % 2]}\n")
        (tmp_path / f"birds/{split}.csv").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "_REGISTERED", {})
    monkeypatch.setattr(image_catalog, "_LOADERS", dict(image_catalog._LOADERS))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    return tmp_path


def train(call, root, config, prefix, *overrides):
    (root / "empty.yaml").write_text(config)
    named = ("DATASETS.ROOT", root, "DATASETS.IMPORT", ["my_data"], "OUTPUT_DIR", root / "run")
    sets = ("DATASETS.TRAIN", [f"{prefix}_train"], "DATASETS.TEST", [f"{prefix}_test"])
    command = ("train_net", "--config-file", root / "empty.yaml", *named, *sets, *COMMON)
    status, _, errors = call(*command, *overrides)
    assert status == 0, errors
    trained = read_results(root / "run").headline().metrics
    forget()
    status, out, _ = call(*command, *overrides, "--eval-only")
    assert status == 0
    return trained, out


def forget():
    """Let what follows be as in a process of its own."""
    sys.modules.pop("my_data")
    catalog._REGISTERED.clear()
    for split in ("train", "test"):
        image_catalog._LOADERS.pop(f"species_{split}")


def test_detection_trains_evaluates_and_draws(call, root):
    trained, out = train(call, root, "TASK: detection\n", "birds", *SMALL)
    assert {"AP-crow", "AP-gull"} <= trained.keys()
    assert "AP-gull" in out
    arguments = (root / "run", "--images", 1, "--output", root / "pictures")
    assert call("visualize", *arguments)[0] == 0
    assert call("visualize", *arguments, "--views")[0] == 0


def test_a_report_shows_examples_of_a_registered_set(call, root):
    train(call, root, "TASK: detection\n", "birds", *SMALL)
    forget()
    assert call("report", root / "run", "--images", 2)[0] == 0
    assert "Left out" not in (root / "run/report.html").read_text()


def test_classification_trains_and_evaluates(call, root):
    input_size = ("CLS.INPUT.SIZE", 32, "CLS.MODEL.NAME", "cifar_resnet20")
    trained, out = train(
        *(call, root, "TASK: classification\n", "species", *input_size),
        *("CLS.INPUT.VIEWS", ["standard"], "SOLVER.IMS_PER_BATCH", 4),
    )
    assert {"top1", "recall-crow", "recall-gull"} <= trained.keys()
    assert "top1" in out


def test_data_tools_import_what_they_are_told(call, root):
    with_root = ("--root", root, "--import", "my_data")
    status, out, _ = call("check_dataset", "birds_train", "birds_test", *with_root)
    assert (status, "birds_test: 4 images, 0 errors" in out) == (0, True)
    assert ["gull", "3", "3", "0", "0"] in [line.split() for line in out.splitlines()]
    status, out, _ = call("check_dataset", "species_train", "--classification", *with_root)
    assert (status, "species_train: 6 images, 0 errors" in out) == (0, True)
    split = ("--percent", 50, "--output", root / "split.json")
    status, out, _ = call("prepare_splits", "birds_train", *with_root, *split)
    assert (status, "crow:" in out) == (0, True)
    plot = ("--datasets", "birds_train", "--data-root", root, "--output", root / "plots")
    assert call("plot_results", *plot, "--import", "my_data")[0] == 0
    assert (root / "plots" / "classes.png").exists()


def test_a_module_that_is_not_there_is_a_users_mistake(call, root):
    for tool, *arguments in (
        ("check_dataset", "birds_train"),
        ("prepare_splits", "birds_train", "--check", "split.json"),
        ("visualize", root),
        ("plot_results", root),
        ("average_checkpoints", root, "--output", root / "soup.pth"),
    ):
        status, _, error = call(tool, *arguments, "--import", "my_dta")
        assert status == 2
        assert error == (
            "error: --import: there is no module 'my_dta' (must be importable: installed, or below "
            "a folder of PYTHONPATH)\n"
        )


def test_a_fault_inside_the_module_is_not_hidden(call, root):
    (root / "my_data.py").write_text("import not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        call("check_dataset", "birds_train", "--import", "my_data")
    (root / "my_data.py").write_text("import my_d\n")  # as cv2_sets that import cv2
    with pytest.raises(ModuleNotFoundError, match="'my_d'"):
        call("check_dataset", "birds_train", "--import", "my_data")
