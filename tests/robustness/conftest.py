"""Processes to kill, and what a run that nobody disturbed leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.output import resume_files

TOY = Path(__file__).with_name("toy.py")
STEPS = 24


class Server:
    """Runs toy.py in processes of their own, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log.txt"
        self._process = subprocess.Popen(
            [sys.executable, str(TOY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # with a GPU, autograd's threads would forbid forking
                "PYTHONPATH": os.pathsep.join(sys.path),  # the library that is tested
            },
        )

    def run(self, directory: Path, **options) -> int:
        """Exit code of a run with these options of `toy.run`, or minus the signal that ended it."""
        self._log.write_text("")
        request = {"directory": str(directory), "log": str(self._log), **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @property
    def log(self) -> str:
        """What the last run logged."""
        return self._log.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(server, tmp_path_factory):
    """Folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert server.run(folder) == 0, server.log
    return folder


@pytest.fixture(scope="session")
def assert_same_run(undisturbed):
    """Checks that a finished run's folder holds the bits and rows of the undisturbed one."""
    expected = final_state(undisturbed), final_models(undisturbed), rows(undisturbed)

    def check(folder: Path) -> None:
        assert_equal(final_state(folder), expected[0], "state")
        assert_equal(final_models(folder), expected[1], "models")
        assert rows(folder) == expected[2]
        assert not list(folder.glob("*.tmp.*"))
        assert all(damage(path) is None for path in folder.glob("*.pth"))
        assert len(resume_files(folder)) <= 2

    return check


def final_state(folder):
    state = load_checkpoint(folder / f"model_{STEPS - 1:07d}.pth")["trainer"]
    # Seconds, and how long metrics.json is: its rows tell the memory that a process needed.
    for hook in ("checkpoint", "metrics"):
        state["hooks"].pop(hook)
    return state


def final_models(folder):
    return [load_checkpoint(folder / name) for name in ("model_averaged.pth", "model_final.pth")]


def rows(folder):
    """Rows of metrics.json without what is measured about the machine."""
    lines = (folder / "metrics.json").read_text().splitlines()
    machine = ("peak_memory_mb", "time", "data_time", "eta_seconds")
    return [{k: v for k, v in json.loads(x).items() if k not in machine} for x in lines]


def assert_equal(found, expected, path):
    """Bitwise equality of nested states; says where they differ."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_equal(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(one, other, f"{path}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert found.shape == expected.shape, path
        bits = (x.contiguous().flatten().view(torch.uint8) for x in (found, expected))
        assert torch.equal(*bits), path
    else:
        assert found == expected, path
