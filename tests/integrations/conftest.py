"""Gives tests a small detectron2 project, or skips them where detectron2 is not installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

collect_ignore = ["toy_project.py", "two_ranks.py"]  # needs detectron2


@pytest.fixture(scope="session")
def project():
    """The module toy_project."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed (docs/detectron2.md)")
    path = Path(__file__).with_name("toy_project.py")
    specification = importlib.util.spec_from_file_location("toy_project", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["toy_project"] = module
    specification.loader.exec_module(module)
    return module
