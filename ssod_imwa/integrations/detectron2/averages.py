"""Averages of its model that a detectron2 project keeps: modules, and EMA states that are none."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import torch
from detectron2.engine import TrainerBase
from torch import nn

from ssod_imwa.integrations.detectron2.trainer_parts import unwrapped

logger = logging.getLogger(__name__)

# hook.ema_updater.state.state: how deep d2go's hook holds its tensors.
DEPTH = 4


class HoldsTensors(Protocol):
    """An object that is no module and holds tensors by name, such as d2go's and detrex's EMAState.

    Attributes:
        state: name -> tensor; the object's owner changes the tensors in place.
    """

    state: Mapping[str, torch.Tensor]


Average = nn.Module | HoldsTensors


class TensorState(nn.Module):
    """The tensors of a `HoldsTensors` for what asks a module for its buffers.

    They are looked up every time, since a load or a move to a device puts others in their place.
    """

    def __init__(self, holder: HoldsTensors) -> None:
        super().__init__()
        self.holder = holder

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of all that the object holds."""
        for name, tensor in self.holder.state.items():
            yield f"{prefix}.{name}" if prefix else name, tensor


def as_module(name: str, average: Average) -> nn.Module:
    """A module whose parameters and buffers are the tensors of an average.

    Args:
        name: of the average, for messages.
        average: of the project.

    Raises:
        TypeError: it is neither a module nor holds tensors.
        ValueError: it holds none yet.
    """
    if isinstance(average, nn.Module):
        return unwrapped(average)
    state = getattr(average, "state", None)
    if not _are_tensors(state):
        raise TypeError(
            f"{name} = {average!r} is not allowed (must be a module, or have an attribute state "
            "that maps names to tensors)"
        )
    if not state:
        raise ValueError(
            f"{name} holds no tensors when training begins (the hook that fills it must come "
            "before IMWAHook, see IMWAHook.register)"
        )
    return TensorState(average)


class UnknownAverages:
    """Warns of averages of a project's model that run on from one member into the next.

    What looks like one is a module with the student's parameters, or a mapping from their names to
    other tensors of their shapes, in an attribute of the trainer, of its hooks or of the model.

    Args:
        student: the model, unwrapped.
        known: what IMWA averages, the student included.
    """

    def __init__(self, student: nn.Module, known: Collection[nn.Module]) -> None:
        self._student = student
        self._known = known
        self._reported: set[int] = set()

    def report(self, trainer: TrainerBase) -> None:
        """Log one warning for each that was not there before."""
        for name, identity in self._find(trainer):
            if identity not in self._reported:
                self._reported.add(identity)
                logger.warning(
                    "%s looks like an average of the model that IMWA does not average: if training "
                    "changes it, it runs on from one member into the next (give it to IMWAHook as "
                    "averaged_state, or its name as teacher)",
                    name.removesuffix(".state"),  # what holds it is what can be given
                )

    def _find(self, trainer: TrainerBase) -> Iterator[tuple[str, int]]:
        shapes = {n: x.shape for n, x in self._student.named_parameters() if x.requires_grad}
        tensors = (x for known in self._known for x in (*known.parameters(), *known.buffers()))
        memory = {tensor.data_ptr() for tensor in tensors}
        roots = {"trainer": trainer, "model": self._student}
        roots |= {type(hook).__name__: hook for hook in trainer._hooks}
        for name, value in _reachable(roots):
            for identity, state in _states(value):
                others = {key.removeprefix("module."): x for key, x in state.items()}
                alike = shapes.items() <= {key: x.shape for key, x in others.items()}.items()
                if shapes and alike and not any(others[n].data_ptr() in memory for n in shapes):
                    yield name, identity


def _states(value: Any) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
    """Tensors by name, of a mapping or of every part of a module."""
    if isinstance(value, nn.Module):
        for part in value.modules():
            yield id(part), dict(part.named_parameters())
    elif isinstance(value, dict) and _are_tensors(value):
        yield id(value), value


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in value.items()
    )


def _reachable(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What some objects hold in attributes, then what that holds, and so on; the nearest first."""
    seen: set[int] = set()
    owners = list(roots.items())
    for _ in range(DEPTH):
        held = [(f"{name}.{key}", x) for name, owner in owners for key, x in _attributes(owner)]
        owners = []
        for name, value in held:
            if id(value) not in seen:
                seen.add(id(value))
                yield name, value
                if not isinstance(value, type | nn.Module | ModuleType):
                    owners.append((name, value))


def _attributes(owner: Any) -> list[tuple[str, Any]]:
    """Attributes of an object, without a hook's trainer and what makes up a module."""
    hidden = "_" if isinstance(owner, nn.Module) else "_hooks"
    attributes = getattr(owner, "__dict__", {})
    return [(k, x) for k, x in attributes.items() if k != "trainer" and not k.startswith(hidden)]
