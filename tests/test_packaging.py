"""pyproject.toml names what the code imports, and the version in the one place."""

import ast
import re
import sys
from pathlib import Path

import pytest

import ssod_imwa

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()

# Modules whose package has another name.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
# What is imported by another library (torch.utils.tensorboard), and what is optional: omegaconf
# comes with detectron2; kornia and semilearn are peers that benchmarks do without.
INDIRECT, OPTIONAL = {"tensorboard"}, {"detectron2", "omegaconf", "kornia", "semilearn"}


def listed(name):
    """The packages of a list of pyproject.toml, without versions."""
    (block,) = re.findall(rf"^{name} = \[\n(.*?)^\]", PROJECT, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r'^    "([\w-]+)', block, flags=re.MULTILINE))


def imported(*folders):
    """The packages of others that files below these folders import."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    ours = {"ssod_imwa", *helpers, *sys.stdlib_module_names}
    return {PACKAGES.get(name, name).replace("_", "-") for name in names - ours}


def test_what_runs_is_declared_and_what_is_declared_is_used():
    assert imported("ssod_imwa", "tools") - OPTIONAL == listed("dependencies") - INDIRECT


def test_what_tests_and_benchmarks_need_is_in_the_dev_extra():
    needed = imported("tests", "benchmarks", "examples") - OPTIONAL
    assert needed <= listed("dependencies") | listed("dev")


def test_the_version_is_the_projects():
    assert f'\nversion = "{ssod_imwa.__version__}"\n' in PROJECT


@pytest.mark.parametrize("text", [None, "", 'name = "other"\nversion = "9"\n'])
def test_without_the_project_file_it_is_that_of_the_installed_package(monkeypatch, tmp_path, text):
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(ssod_imwa, "__file__", str(tmp_path / "ssod_imwa" / "__init__.py"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"the one of {name}")
    assert ssod_imwa._version() == "the one of ssod_imwa"
