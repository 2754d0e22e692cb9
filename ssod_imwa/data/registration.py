"""Modules of users that register data sets under names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ssod_imwa.errors import ConfigError


def import_modules(names: Sequence[str], *, option: str = "DATASETS.IMPORT") -> None:
    """Import modules, which then register their data sets.

    Args:
        names: such as "my_project.data".
        option: what named them, for the error.

    Raises:
        ConfigError: there is no such module. What goes wrong inside one is raised as it is.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, but not what it imports
            raise ConfigError(
                f"{option}: there is no module {name!r} (must be importable: installed, or below a "
                "folder of PYTHONPATH)"
            ) from None
