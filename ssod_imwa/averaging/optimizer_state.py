"""The optimizer state of members, and the four policies for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssod_imwa.averaging.checks import is_averaged
from ssod_imwa.averaging.member_state import KeptState, clone_state
from ssod_imwa.averaging.weights import State, weighted_mean

POLICIES = ("keep", "average", "reset", "carry")


class OptimizerStates:
    """What happens to momentum and moments between members (the `optimizer_state` of `IMWA`).

    Param groups (learning rates, ...) always belong to the member: each finds them as they were at
    the start of its part of the episode.

    Args:
        optimizer: its state is the training member's.
        policy: "keep" one state per member; "average" them together with the weights; "reset" to
            the state before the first step; "carry" on to the next member.
        members: M.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, policy: str, members: int) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.members = members
        self._kept = KeptState(optimizer, members, device="cpu")
        self._initial: dict[str, Any] = {}
        self._start: dict[str, Any] = {}
        self._finished: list[dict[str, Any]] = []

    def begin_run(self) -> None:
        """Remember, at the first step of all, what a reset goes back to."""
        if self.policy == "reset":
            self._initial = self._capture()["state"]

    def part(self) -> None:
        """Remember, where members part, what each of them begins with."""
        if self.policy == "keep":
            self._kept.part()

    def begin_episode(self) -> None:
        """Remember, at an episode's first step, what its later members begin with."""
        if self.policy != "keep":
            self._start = {"param_groups": copy.deepcopy(self._groups())}
            self._finished = []
        if self.policy == "average":
            self._start = self._capture()

    def next_member(self, member: int, *, spoiled: bool = False) -> None:
        """Give the optimizer the state of the member that follows in the episode."""
        if self.policy == "keep":
            self._kept.switch(member, member + 1)
            return
        if self.policy == "average":
            if not spoiled:
                self._finished.append(self._capture())
            self._load(self._start["state"], self._start["param_groups"])
        elif self.policy == "reset":
            self._load(self._initial, self._start["param_groups"])
        else:  # carry: the tensors stay where they are
            groups = clone_state(self._start["param_groups"])
            live = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**live, "param_groups": groups})
        if member + 1 == self.members - 1:
            self._start = {}

    def averaged(self, weights: Sequence[float], *, spoiled: bool, accumulate: str) -> Any:
        """The state that follows an episode under "average", else None; changes nothing.

        Args:
            weights: of the good members, in order.
            spoiled: whether the live member is not one of them.
            accumulate: see `average`.
        """
        if self.policy != "average":
            return None
        states = self._finished if spoiled else [*self._finished, self._capture()]
        return average_slots([state["state"] for state in states], weights, accumulate=accumulate)

    def end_episode(self, averaged: Any, *, spoiled: Sequence[int] = ()) -> None:
        """Give the optimizer the state with which member 0 begins the next episode."""
        self.end_alone()
        if self.policy == "average":
            self._load(averaged, self._groups())
            self._finished = []
        elif self.policy == "keep":
            self._kept.switch(self.members - 1, 0, spoiled=spoiled)

    def end_alone(self) -> None:
        """As `end_episode` of an episode with one member: its state goes on, or is reset."""
        if self.policy == "reset":
            self._load(self._initial, self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.state_dict()["param_groups"]

    def _capture(self) -> dict[str, Any]:
        return clone_state(self.optimizer.state_dict(), device="cpu")

    def _load(self, slots: Any, groups: Any) -> None:
        self.optimizer.load_state_dict(clone_state({"state": slots, "param_groups": groups}))

    def state_dict(self) -> dict[str, Any]:
        """The states of the members that do not train (not copied)."""
        return {
            "kept": self._kept.state_dict(),
            "initial": self._initial,
            "start": self._start,
            "finished": list(self._finished),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._kept.load_state_dict(state["kept"])
        self._initial = clone_state(state["initial"])
        self._start = clone_state(state["start"])
        self._finished = clone_state(state["finished"])


def average_slots(
    states: Sequence[dict[Any, dict[str, Any]]],
    weights: Sequence[float],
    *,
    accumulate: str = "float64",
) -> dict[Any, dict[str, Any]]:
    """The mean of optimizer states: floating tensors have one, step counters and others must agree.

    Args:
        states: "state" of each member's `optimizer.state_dict()`: parameter -> slot -> value.
        weights: of the members; they need not sum to 1.
        accumulate: see `average`.

    Raises:
        ValueError: members hold different slots, or disagree about a counter.
    """
    moments, others = zip(*(split_slots(state) for state in states), strict=True)
    check_counters(others)
    return joined_slots(states[0], weighted_mean(moments, weights, accumulate=accumulate))


def check_counters(members: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if members differ in what `split_slots` returned second."""
    for member, other in enumerate(members[1:], start=1):
        for name in sorted(members[0].keys() ^ other.keys()):
            raise ValueError(
                f"optimizer slot {name} exists only for some members (0 or {member}); "
                'optimizer_state = "average" needs equal slots, "keep" does not'
            )
        for name, value in other.items():
            if not _equal(value, members[0][name]):
                raise ValueError(
                    f"optimizer slot {name} is {members[0][name]} for member 0 but {value} for "
                    f'member {member}; optimizer_state = "average" needs equal counters'
                )


def joined_slots(state: dict[Any, dict[str, Any]], mean: State) -> dict[Any, dict[str, Any]]:
    """A member's optimizer state with the means in place of what has one."""
    return {
        parameter: {
            slot: mean.get(f"{parameter}.{slot}", clone_state(value))
            for slot, value in slots.items()
        }
        for parameter, slots in state.items()
    }


def split_slots(state: dict[Any, dict[str, Any]]) -> tuple[State, dict[str, Any]]:
    """Slots that have a mean, and the others."""
    moments: State = {}
    others: dict[str, Any] = {}
    for parameter, slots in state.items():
        for slot, value in slots.items():
            # Adam counts its steps in a float32 tensor.
            has_mean = isinstance(value, Tensor) and is_averaged(value) and slot != "step"
            (moments if has_mean else others)[f"{parameter}.{slot}"] = value
    return moments, others


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other
