"""The hook on two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

LAUNCHER = """
import sys
sys.path.insert(0, {folder!r})
from two_ranks import work
from ssod_imwa.engine.launch import launch
if __name__ == "__main__":
    sys.exit(launch(work, 2, ({output!r},), device="cpu"))
"""


def test_two_ranks_agree_on_the_averages(tmp_path):
    script = tmp_path / "run.py"
    folder = str(Path(__file__).parent)
    script.write_text(LAUNCHER.format(folder=folder, output=str(tmp_path)))
    subprocess.run([sys.executable, script], check=True, timeout=300)
    first, second = (
        torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
