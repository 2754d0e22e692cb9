"""The benchmark of classification's input runs and compares the same images."""

import importlib.util
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
def test_benchmark_prints_its_rows_for_each_recipe(benchmark, capsys):
    arguments = ["--images", "4", "--batch-size", "2", "--workers", "0", "--repeats", "1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads wait for each other where tests run side by side
    try:
        with torch.random.fork_rng():
            benchmark.main(arguments)
    finally:
        torch.set_num_threads(threads)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
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
                next(make(dataset, recipe, steps=1, args=settings)).views[0]
                for make in (benchmark.usual_batches, benchmark.our_batches)
            ]
        for statistic in (torch.mean, torch.std):
            usual, ours = (statistic(x) for x in inputs)
            assert usual.item() == pytest.approx(ours.item(), abs=0.1)
