"""A step on the student's averaged move, in place of the move itself (DiLoCo, SlowMo)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.arithmetic import batches, scratch, wide
from ssod_imwa.averaging.checks import is_averaged
from ssod_imwa.averaging.weights import State, snapshot


@dataclass(frozen=True)
class Outer:
    """How far the student goes at an episode's end, seen from where the episode began.

    Attributes:
        lr: share of the averaged move, above 0; 1 without momentum goes to the mean.
        momentum: share of the move before that is added, 0..1, 1 excluded.
        nesterov: look ahead by one more momentum, as DiLoCo does; needs a momentum.

    Raises:
        ValueError: a value is out of range.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"outer lr = {self.lr} is not allowed (must be above 0)")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"outer momentum = {self.momentum} is not allowed (must be at least 0, below 1)"
            )
        if self.nesterov and not self.momentum:
            raise ValueError("outer nesterov = True is not allowed without momentum")

    @property
    def is_mean(self) -> bool:
        """Whether the student simply becomes the mean."""
        return self.lr == 1 and self.momentum == 0


TO_THE_MEAN = Outer()


class OuterStep:
    """Stochastic gradient descent whose gradient is the averaged move of an episode, negated.

    With the mean m of the members' weights and their common start s, d = m - s::

        v = momentum * v + d
        weights = s + lr * (momentum * v + d if nesterov else v)

    (DiLoCo, arXiv 2311.08105, Algorithm 1 with SGD as OuterOpt; SlowMo, arXiv 1910.00643, is the
    form without Nesterov.) Parameters that are trained go this way; a teacher's, which follow
    them, and all buffers become the mean. It holds a copy of these parameters during an episode,
    and another one, the momentum, all the time.

    Args:
        modules: name -> module, as `IMWA` has them.
        outer: the settings.
        device: "same" as the model, or "cpu": where the copies wait.
        accumulate: precision of the step, see `average`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> step = OuterStep({"model": model}, Outer(lr=0.5))
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> step.begin_episode({"model.weight": model.weight.detach()})
        >>> step.moved({"model.weight": torch.tensor([[3.0]])})
        {'model.weight': tensor([[2.]])}
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        outer: Outer,
        *,
        device: str = "same",
        accumulate: str = "float64",
    ) -> None:
        self.outer = outer
        self.device = None if device == "same" else device
        self.accumulate = accumulate
        self._names = {
            f"{prefix}.{name}"
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and is_averaged(parameter)
        }
        self._start: State = {}
        self._momentum: State = {}
        self._next_momentum: State = {}

    def begin_episode(self, live: State) -> None:
        """Remember where the members of an episode begin."""
        self._start = self._copy({name: x for name, x in live.items() if name in self._names})
        if self.outer.momentum and not self._momentum:
            self._momentum = {name: torch.zeros_like(x) for name, x in self._start.items()}

    def _copy(self, state: State) -> State:
        pin = self.device == "cpu" and any(tensor.is_cuda for tensor in state.values())
        return snapshot(state, device=self.device, pin=pin)

    @torch.no_grad()
    def moved(self, mean: State) -> State:
        """Where the step leads what is trained, as new tensors; it is not taken yet.

        Args:
            mean: of the members, see `IMWA`; on any device.
        """
        start, momentum = self._start, self._momentum
        goals = {name: mean[name].to(x.device) for name, x in start.items()}
        results = {name: torch.empty_like(x) for name, x in start.items()}
        self._next_momentum = {name: torch.empty_like(x) for name, x in momentum.items()}
        pairs = (momentum, self._next_momentum) if momentum else ()
        for outputs, *columns in batches(
            [results[n], start[n], goals[n], *(state[n] for state in pairs)] for n in start
        ):
            begins, moves, *velocities = (
                self._widened(column) for column in columns[: 2 + bool(pairs)]
            )
            torch._foreach_sub_(moves, begins)
            if velocities:
                moves = self._accelerated(moves, velocities[0], columns[-1])
            torch._foreach_mul_(moves, self.outer.lr)
            torch._foreach_add_(begins, moves)
            torch._foreach_copy_(outputs, begins)
        return results

    def _widened(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        copies = scratch(tensors, wide(tensors[0].dtype, self.accumulate))
        torch._foreach_copy_(copies, tensors)
        return copies

    def _accelerated(
        self,
        moves: list[torch.Tensor],
        velocities: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Moves with momentum, which is written to the outputs; changes its arguments."""
        torch._foreach_mul_(velocities, self.outer.momentum)
        torch._foreach_add_(velocities, moves)
        torch._foreach_copy_(outputs, velocities)
        if not self.outer.nesterov:
            return velocities
        torch._foreach_add_(moves, velocities, alpha=self.outer.momentum)
        return moves

    def end_episode(self) -> None:
        """The step is taken: its momentum counts, and the episode's start is forgotten."""
        self._start = {}
        self._momentum, self._next_momentum = self._next_momentum, {}

    def state_dict(self) -> dict[str, Any]:
        """All that is kept (not copied: serialize it before the next step)."""
        return {"start": self._start, "momentum": self._momentum}

    def load_state_dict(self, state: Mapping[str, Any], *, live: State) -> None:
        """Continue where `state_dict` was taken, for a model with these live tensors."""
        self._start = self._placed(state["start"], live)
        self._momentum = self._placed(state["momentum"], live)

    def _placed(self, saved: State, live: State) -> State:
        return {
            name: tensor.to(self.device or live[name].device, copy=True)
            for name, tensor in saved.items()
        }
