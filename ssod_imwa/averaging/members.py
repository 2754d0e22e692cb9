"""Weights of the members that do not train at the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ssod_imwa.averaging.checks import check_coefficients
from ssod_imwa.averaging.weights import RunningAverage, State, copy_, snapshot, weighted_mean

Rule = Callable[[list[State]], Sequence[float]]

KINDS = ("dict", "stream")
DEVICES = ("same", "cpu")


class MemberStore:
    """The start weights of an episode and its finished members, or a running mean of them.

    With M members of P bytes, "dict" holds at most M - 1 copies of P while a member trains,
    "stream" one sum (2 P for a float64 sum of float32 weights) and, for M >= 3, the start weights.

    Args:
        kind: "dict" or "stream".
        device: "same" as the model, or "cpu": host memory, allocated once and page-locked if there
            is a GPU; averages are then formed on the host.
        accumulate: see `average`.
        coefficients: weight of each member, None for equal weights.

    Attributes:
        start: the weights that every member of the episode begins with, while they are needed.
        members: numbers of the finished members.
    """

    def __init__(
        self,
        kind: str = "dict",
        *,
        device: str = "same",
        accumulate: str = "float64",
        coefficients: Sequence[float] | None = None,
    ) -> None:
        for name, value, allowed in (("store", kind, KINDS), ("store_device", device, DEVICES)):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r} is not allowed (must be one of {allowed})")
        self.kind = kind
        self.device = device
        self.accumulate = accumulate
        self.coefficients = coefficients
        self.start: State | None = None
        self.members: list[int] = []
        self._states: list[State] = []
        self._running = self._new_running()
        # Host copies that are not in use; allocating page-locked memory is slow.
        self._free: list[State] = []

    def _new_running(self) -> RunningAverage:
        return RunningAverage(accumulate=self.accumulate, uniform=self.coefficients is None)

    def remember_start(self, live: State) -> None:
        """Keep a copy of the weights that the episode begins with."""
        self.start = self._copy(live)

    def reseed_(self, live: State) -> None:
        """Set the live tensors to the episode's start weights."""
        if self.start is None:
            raise RuntimeError("the episode's start weights are not there; remember them first")
        copy_(live, self.start)

    def drop_start(self) -> None:
        """Free the start weights: the last member has begun."""
        if self.start is not None:
            self._release(self.start)
            self.start = None

    def add(self, member: int, live: State) -> None:
        """Keep a copy of a finished member, or add it to the running mean."""
        if self.kind == "dict":
            self._states.append(self._copy(live))
        elif weight := self._weight(member):
            with self._on_store_device(live) as state:
                self._running.add(state, weight=weight)
        self.members.append(member)

    def _weight(self, member: int) -> float:
        return 1.0 if self.coefficients is None else self.coefficients[member]

    def average(
        self, last: tuple[int, State] | None, rule: Rule | None = None
    ) -> tuple[State, list[float]]:
        """The mean of the finished members and of a live one; nothing in the store changes.

        Args:
            last: number and live weights of a member that is not in the store, or None.
            rule: given the members' weights, their coefficients; "dict" only.

        Returns:
            New tensors, and the weight of each member in them.
        """
        if last is None:
            return self._average([], [], rule)
        with self._on_store_device(last[1]) as state:
            return self._average([last[0]], [state], rule)

    def _average(
        self, last: list[int], state: list[State], rule: Rule | None
    ) -> tuple[State, list[float]]:
        members = self.members + last
        weights = [self._weight(member) for member in members]
        if rule is not None:
            states = self._states + state
            weights = check_coefficients(rule(states), len(states))
        if not any(weights):
            raise FloatingPointError(
                f"members {members}, which alone are finite, have the coefficients {weights}; none "
                "is positive"
            )
        if self.kind == "dict":
            states = self._states + state
            return weighted_mean(states, weights, accumulate=self.accumulate), weights
        if last and weights[-1]:
            return self._running.result(last=state[0], weight=weights[-1]), weights
        return self._running.result(), weights

    def clear(self) -> None:
        """Forget the finished members: their average is formed."""
        self.drop_start()
        for state in self._states:
            self._release(state)
        self._states = []
        self.members = []
        self._running = self._new_running()

    def _copy(self, live: State) -> State:
        if self.device == "same":
            return snapshot(live)
        if self._free:
            copies = self._free.pop()
            copy_(copies, live)
            return copies
        return snapshot(live, device="cpu", pin=any(tensor.is_cuda for tensor in live.values()))

    def _release(self, state: State) -> None:
        if self.device == "cpu":
            self._free.append(state)

    @contextmanager
    def _on_store_device(self, live: State) -> Iterator[State]:
        if self.device == "same":
            yield live
            return
        copies = self._copy(live)
        try:
            yield copies
        finally:
            self._release(copies)

    def state_dict(self) -> dict[str, Any]:
        """All that is kept (not copied: serialize it before the next step)."""
        return {
            "start": self.start,
            "members": list(self.members),
            "states": list(self._states),
            "running": self._running.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, live: State) -> None:
        """Continue where `state_dict` was taken, for a model with these live tensors."""
        self.clear()
        self.start = None if state["start"] is None else self._placed(state["start"], live)
        self.members = list(state["members"])
        self._states = [self._placed(saved, live) for saved in state["states"]]
        self._running.load_state_dict(
            state["running"], like=live if self.device == "same" else None
        )

    def _placed(self, saved: State, live: State) -> State:
        copies = self._copy(live)
        copy_(copies, saved)
        return copies
