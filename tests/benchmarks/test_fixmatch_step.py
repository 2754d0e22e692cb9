"""The benchmark of a FixMatch step runs and its pieces make the step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_benchmark_prints_its_rows_and_input_is_a_small_share():
    sizes = ("--batch-size", "2", "--steps", "2", "--workers", "0")
    printed = subprocess.run(
        [sys.executable, "benchmarks/fixmatch_step.py", *sizes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    header, *rows = (line.split() for line in printed.splitlines()[1:])
    values = {row[0]: dict(zip(header, row[1:], strict=True)) for row in rows}
    assert {"ours", "usual"} <= values.keys()
    ours = {name: float(value.rstrip("%")) for name, value in values["ours"].items()}
    assert ours["data"] + ours["augmentation"] == pytest.approx(ours["input"], abs=0.02)
    assert ours["share"] < 10
