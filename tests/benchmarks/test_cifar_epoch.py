"""The benchmark of classification's input runs and compares the same images."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location(
        "cifar_epoch", ROOT / "benchmarks/cifar_epoch.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_benchmark_prints_its_rows_for_each_recipe(benchmark):
    sizes = ("--images", "4", "--batch-size", "2", "--workers", "0", "--repeats", "1")
    printed = subprocess.run(
        [sys.executable, "benchmarks/cifar_epoch.py", *sizes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [recipe, name]
        for recipe in ("plain", "strong")
        for name in (*benchmark.ROWS, "ours/public", "ours/usual")
    ]
    for row in rows:
        assert float(row[2]) > 0


def test_both_inputs_have_the_same_statistics(benchmark):
    dataset = benchmark.make_noise(64)
    settings = SimpleNamespace(batch_size=64, workers=0, device=torch.device("cpu"))
    for recipe in benchmark.RECIPES:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            inputs = [
                next(make(dataset, recipe, steps=1, args=settings))["labeled"].views["image"]
                for make in (benchmark.usual_batches, benchmark.our_batches)
            ]
        for statistic in (torch.mean, torch.std):
            usual, ours = (statistic(x) for x in inputs)
            assert usual.item() == pytest.approx(ours.item(), abs=0.1)
