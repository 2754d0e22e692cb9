"""The folder below which all data sets lie."""

from __future__ import annotations

import os
from pathlib import Path

from ssod_imwa.errors import DataError

ROOT_VARIABLE = "DETECTRON2_DATASETS"
DEFAULT_ROOT = "datasets"


def data_root(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else $DETECTRON2_DATASETS, else "datasets"."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def check_root(root: str | Path | None) -> None:
    """Raise DataError if a folder was named, by argument or variable, and is not there."""
    folder = data_root(root)
    variable = os.environ.get(ROOT_VARIABLE)
    if (root or variable) and not os.path.isdir(folder):
        named = "DATASETS.ROOT or a --root option" if root else f"${ROOT_VARIABLE}"
        raise DataError(
            f"the folder of all data sets, {folder.absolute()}, does not exist (named by {named}; "
            "correct the name, or make the folder)"
        )
