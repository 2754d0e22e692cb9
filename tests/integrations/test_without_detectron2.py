"""Everything else works where detectron2 is not installed."""

import subprocess
import sys

WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError("No module named 'detectron2'", name="detectron2")

sys.meta_path.insert(0, Missing())
"""
EVERYTHING = """
import importlib, pkgutil, ssod_imwa
for module in pkgutil.walk_packages(ssod_imwa.__path__, "ssod_imwa."):
    if "detectron2" not in module.name:
        importlib.import_module(module.name)
assert "detectron2" not in sys.modules
"""
CHOSEN = """
from ssod_imwa.runs.config import load_config
from ssod_imwa.errors import ConfigError
try:
    load_config(overrides=["MODEL.TOOLKIT", "detectron2"])
except ConfigError as error:
    print(error)
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, check=True
    ).stdout


def test_nothing_else_imports_it():
    run(EVERYTHING)


def test_choosing_it_says_how_to_install_it():
    assert run(CHOSEN) == (
        "MODEL.TOOLKIT = 'detectron2': detectron2 is not installed (see docs/detectron2.md, or "
        "choose torchvision)\n"
    )
