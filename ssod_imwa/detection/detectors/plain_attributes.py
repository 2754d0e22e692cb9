"""Numbers that detectors keep outside their state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class PlainAttributes:
    """A number that some modules keep outside their state dict, such as `loss_normalizer`.

    detectron2's dense detectors hold the running normalizer of their losses as a plain attribute,
    which is not there before their first loss and which no checkpoint contains.

    Args:
        modules: searched with all their submodules.
        owner: type of the modules that have it.
        name: of the attribute.
    """

    def __init__(self, modules: Mapping[str, nn.Module], owner: type, name: str) -> None:
        self._name = name
        self._owners = {
            f"{key}.{path}": module
            for key, root in modules.items()
            for path, module in root.named_modules()
            if isinstance(module, owner)
        }

    def state_dict(self) -> dict[str, Any]:
        """Path of a module -> value, where there is one."""
        return {
            path: getattr(module, self._name)
            for path, module in self._owners.items()
            if hasattr(module, self._name)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the values again, and remove those that were not there."""
        for path, module in self._owners.items():
            if path in state:
                setattr(module, self._name, state[path])
            elif hasattr(module, self._name):
                delattr(module, self._name)
