"""The example for detectron2 projects, run as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssod_imwa.detection.data.digits import make_digits

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "imwa_in_detectron2.py"


def test_the_example_trains_evaluates_averages_and_resumes(tmp_path):
    make_digits(tmp_path / "digits", train_scenes=12, test_scenes=10)
    output = tmp_path / "run"
    command = [sys.executable, EXAMPLE, "--iterations", "4", "--output", output]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = (output / "metrics.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows if "bbox/AP" in row] == [3, 8]

    weights = output / "model_final.pth"
    before = weights.read_bytes()
    subprocess.run(command, env=environment, check=True, capture_output=True)  # nothing is left
    assert weights.read_bytes() == before
    added = (output / "metrics.json").read_text().splitlines()[len(lines) :]
    assert not any("total_loss" in line for line in added)  # a second training would be equal
