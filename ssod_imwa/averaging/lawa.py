"""The mean of the latest averages of a run (LAWA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ssod_imwa.averaging.checks import check_accumulate, is_averaged
from ssod_imwa.averaging.weights import State, average, frozen_parameters, named_state, snapshot


class LatestAverages:
    """The last k states of some modules, and their mean.

    Latest weight averaging (Kaddour, arXiv 2209.14981) averages the last k checkpoints of a run,
    which is left alone. Here the states are those at ends of episodes, averages of members, or of
    one member what it is. They wait in host memory: k copies of the modules' parameters that are
    trained and of their floating buffers. Integer buffers have no mean over time and stay.

    Args:
        k: states of each module that are kept, at least 1.
        accumulate: see `average`.

    Raises:
        ValueError: an argument is not allowed.

    Example:
        >>> model, latest = nn.Linear(1, 1, bias=False), LatestAverages(2)
        >>> for value in (1.0, 2.0, 4.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     latest.add({"student": model})
        >>> latest.mean()
        {'student': {'weight': tensor([[3.]])}}
    """

    def __init__(self, k: int, *, accumulate: str = "float64") -> None:
        if k < 1:
            raise ValueError(f"k = {k} is not allowed (must be at least 1)")
        check_accumulate(accumulate)
        self.k = k
        self.accumulate = accumulate
        self._states: dict[str, list[State]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no state was added yet."""
        return not self._states

    def add(self, modules: Mapping[str, nn.Module]) -> None:
        """Copy the state of modules; one that comes later has fewer states to average."""
        for name, state in averaged_tensors(modules).items():
            pin = any(tensor.is_cuda for tensor in state.values())
            states = self._states.setdefault(name, [])
            states.append(snapshot(state, device="cpu", pin=pin))
            del states[: -self.k]

    def mean(self) -> dict[str, State]:
        """The mean of the states of each module, as new tensors in host memory."""
        return {
            name: average(states, accumulate=self.accumulate)
            for name, states in self._states.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All states (not copied: serialize them before the next `add`)."""
        return {"states": {name: list(states) for name, states in self._states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with another k, too."""
        self._states = {
            name: [snapshot(saved, device="cpu") for saved in states[-self.k :]]
            for name, states in state["states"].items()
        }


def averaged_tensors(modules: Mapping[str, nn.Module]) -> dict[str, State]:
    """The live tensors of each module that have a mean and are not frozen, by name."""
    frozen = frozen_parameters(modules)
    return {
        name: {
            key.removeprefix("."): tensor
            for key, tensor in named_state({"": module}, frozen=frozen).items()
            if is_averaged(tensor)
        }
        for name, module in modules.items()
    }
