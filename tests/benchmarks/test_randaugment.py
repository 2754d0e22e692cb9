"""The benchmark of RandAugment runs and finds ours equal to Pillow's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_benchmark_prints_its_rows():
    printed = subprocess.run(
        [sys.executable, "benchmarks/randaugment.py", "--batch-size", "64", "--repeats", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    assert {"pillow", "ours", "torchvision"} <= rows.keys()
    assert rows["ours"][1:] == ["0.0%", "0.0%", "0.00%"]
    assert all(float(row[0]) > 0 for row in rows.values())
    # Pillow's geometry and lookup tables; blends differ by a level.
    assert float(rows["torchvision"][3].rstrip("%")) < 0.5
