"""Command lines, run in the process of the test."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

from ssod_imwa.cli import run_main

TOOLS = Path(__file__).parents[2] / "tools"


def load(name):
    """The module of a tool, executed anew."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a tool with arguments; its exit status, stdout and stderr."""

    def run(name, *arguments):
        module = load(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        handlers = list(logging.root.handlers)
        with pytest.raises(SystemExit) as stop:
            run_main(module.main)
        # The tool's writes to a standard error that is closed after this test.
        logging.root.handlers[:] = handlers
        return stop.value.code, *capsys.readouterr()

    return run
