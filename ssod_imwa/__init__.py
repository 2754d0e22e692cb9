"""Semi-supervised detection under iterative model weight averaging (IMWA)."""

import re
from importlib import metadata
from pathlib import Path


def _version() -> str:
    """What pyproject.toml says: of this checkout, else of the installed package."""
    # First, since a checkout may be on the path while another version is installed.
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        text = project.read_text(encoding="utf-8")
        if stated := re.search(r'^name = "ssod_imwa"\nversion = "(.+)"$', text, flags=re.MULTILINE):
            return stated[1]
    return metadata.version("ssod_imwa")


__version__ = _version()
