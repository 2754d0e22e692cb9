"""The benchmark of detection's step counts each part once, and runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    specification = importlib.util.spec_from_file_location(
        "detection_step", ROOT / "benchmarks/detection_step.py"
    )
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_a_part_does_not_count_those_inside_it(benchmark):
    now = [0.0]
    clock = benchmark.Clock(torch.device("cpu"), lambda: now[0])

    def takes(seconds):
        now[0] += seconds

    student = clock.timed("student", takes)

    def losses():
        takes(1)
        student(3)
        takes(2)

    labels = clock.timed("labels", losses)
    backward = clock.timed("backward", lambda: (labels(), takes(5)))
    for _ in range(2):
        clock.begin_step()
        backward()
    assert clock.steps == [{"student": 3, "labels": 3, "backward": 5}] * 2
    medians = clock.medians(warm_up=1)
    assert medians["step"] == 11_000
    assert medians["data"] == 0


@pytest.mark.slow
def test_each_recipe_has_a_row_whose_parts_are_its_step():
    command = [sys.executable, "benchmarks/detection_step.py", "--steps", "2", "--warm-up", "1"]
    printed = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│ digits/" in line]
    assert [row[0].strip() for row in rows] == ["digits/supervised", "digits/unbiased_teacher"]
    for row in rows:
        step, _, *parts = map(float, row[2:])
        assert sum(parts) == pytest.approx(step, rel=0.3)  # medians of parts, two steps
        assert all(part > 0 for part in parts[3:6])
