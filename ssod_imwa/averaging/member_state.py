"""What members own besides weights and optimizer state: scalers, queues, estimates of a method."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ssod_imwa.averaging.weights import State, weighted_mean

AT_AVERAGE = ("kept", "averaged", "shared")


class Stateful(Protocol):
    """An object whose state can be saved and restored: an optimizer, a gradient scaler, ...

    It may have an attribute `at_average`, see `MemberState`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore its state."""


def clone_state(value: Any, *, device: torch.device | str | None = None) -> Any:
    """A nested state with all tensors cloned, on `device` or each on its own.

    Used when saving, as a state dict holds live tensors, and when loading, as an optimizer keeps
    and changes the tensors that it is given.
    """
    if isinstance(value, Tensor):
        return value.detach().to(value.device if device is None else device, copy=True)
    if isinstance(value, dict):
        return {key: clone_state(item, device=device) for key, item in value.items()}
    if isinstance(value, list):
        return [clone_state(item, device=device) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(clone_state(item, device=device) for item in value)
    return copy.deepcopy(value)


class KeptState:
    """The state of one object, one per member: restored whenever the member comes back.

    Args:
        owner: holds the state of the member that trains.
        members: M.
        device: where the others' states wait; None leaves every tensor on its own.
    """

    def __init__(
        self, owner: Stateful, members: int, *, device: torch.device | str | None = None
    ) -> None:
        self.owner = owner
        self.members = members
        self.device = device
        self._initial: dict[str, Any] | None = None
        self._saved: dict[int, dict[str, Any]] = {}

    def part(self) -> None:
        """Remember the state that every member begins its first episode with."""
        self._initial = self._capture()

    def switch(self, member: int, following: int, *, spoiled: Sequence[int] = ()) -> None:
        """Save a finished member's state and restore that of the next one.

        Args:
            member: the one that has finished.
            following: the one that trains next.
            spoiled: members whose states are given up for the first good member's.
        """
        self._saved[member] = self._capture()
        for number in spoiled:
            good = min(self._saved.keys() - set(spoiled))
            self._saved[number] = clone_state(self._saved[good])
        state = self._saved.pop(following, self._initial)
        self.owner.load_state_dict(clone_state(state))
        if following == self.members - 1:
            self._initial = None

    def _capture(self) -> dict[str, Any]:
        return clone_state(self.owner.state_dict(), device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """The states of the members that do not train (not copied)."""
        return {"initial": self._initial, "saved": dict(self._saved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._initial = clone_state(state["initial"])
        self._saved = clone_state(state["saved"])


class AveragedState:
    """The state of one object, averaged like weights: all members of an episode begin with one.

    Args:
        owner: holds the state of the member that trains.
    """

    def __init__(self, owner: Stateful) -> None:
        self.owner = owner
        self._start: dict[str, Any] = {}
        self._finished: list[dict[str, Any]] = []

    def begin_episode(self) -> None:
        """Remember what the members of the episode begin with."""
        self._start = clone_state(self.owner.state_dict())
        self._finished = []

    def next_member(self, *, spoiled: bool = False) -> None:
        """Give the owner the episode's first state again; a spoiled member's is forgotten."""
        if not spoiled:
            self._finished.append(clone_state(self.owner.state_dict()))
        self.owner.load_state_dict(clone_state(self._start))

    def averaged(self, weights: Sequence[float], *, spoiled: bool, accumulate: str) -> Any:
        """The mean of the good members' states; changes nothing.

        Args:
            weights: of the good members, in order.
            spoiled: whether the live member is not one of them.
            accumulate: see `average`.
        """
        states = self._finished if spoiled else [*self._finished, self.owner.state_dict()]
        return mean_of_states(states, weights, accumulate=accumulate)

    def end_episode(self, averaged: Any) -> None:
        """Give the owner the mean."""
        self.owner.load_state_dict(clone_state(averaged))
        self._start, self._finished = {}, []

    def state_dict(self) -> dict[str, Any]:
        """What is needed of the episode so far (not copied)."""
        return {"start": self._start, "finished": list(self._finished)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._start = clone_state(state["start"])
        self._finished = clone_state(state["finished"])


class MemberState:
    """The state of one object under IMWA, each entry treated as the object says.

    Its attribute `at_average` maps entries of its state dict to "kept" (every member has its own),
    "averaged" (like weights) or "shared" (members in turn hand on one and the same). Entries that
    it does not name, and objects without the attribute, are kept.

    Args:
        owner: holds the state of the member that trains.
        members: M.

    Raises:
        ValueError: the object names something else than these three.
    """

    def __init__(self, owner: Stateful, members: int) -> None:
        kept = entries(owner, "kept")
        averaged = entries(owner, "averaged")
        self._kept = None if kept is None else KeptState(kept, members)
        self._averaged = None if averaged is None else AveragedState(averaged)

    def part(self) -> None:
        """Remember, where members part, what each of them begins with."""
        if self._kept is not None:
            self._kept.part()

    def begin_episode(self) -> None:
        """Remember, at an episode's first step, what its members begin with."""
        if self._averaged is not None:
            self._averaged.begin_episode()

    def next_member(self, member: int, *, spoiled: bool = False) -> None:
        """Give the owner the state of the member that follows in the episode."""
        if self._kept is not None:
            self._kept.switch(member, member + 1)
        if self._averaged is not None:
            self._averaged.next_member(spoiled=spoiled)

    def averaged(self, weights: Sequence[float], *, spoiled: bool, accumulate: str) -> Any:
        """What follows an episode of entries that are averaged; see `AveragedState.averaged`."""
        if self._averaged is None:
            return None
        return self._averaged.averaged(weights, spoiled=spoiled, accumulate=accumulate)

    def end_episode(self, member: int, averaged: Any, *, spoiled: Sequence[int] = ()) -> None:
        """Give the owner the state with which member 0 begins the next episode."""
        if self._kept is not None:
            self._kept.switch(member, 0, spoiled=spoiled)
        if self._averaged is not None:
            self._averaged.end_episode(averaged)

    def state_dict(self) -> dict[str, Any]:
        """What the live object does not hold (not copied)."""
        parts = {"kept": self._kept, "averaged": self._averaged}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if self._kept is not None:
            self._kept.load_state_dict(state["kept"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])


def entries(owner: Stateful, rule: str) -> Stateful | None:
    """The entries of an object's state of which this becomes at an average, None if there are none.

    Args:
        owner: see `MemberState`.
        rule: one of `AT_AVERAGE`.

    Raises:
        ValueError: the object names something else.
    """
    rules: Mapping[str, str] = getattr(owner, "at_average", {})
    for name, value in rules.items():
        if value not in AT_AVERAGE:
            raise ValueError(
                f"at_average[{name!r}] = {value!r} of {type(owner).__name__} is not allowed (must "
                f"be one of {AT_AVERAGE})"
            )
    if not rules and rule == "kept":
        return owner
    return _Entries(owner, rules, rule) if rule == "kept" or rule in rules.values() else None


class _Entries:
    """Some entries of an object's state as a state of its own."""

    def __init__(self, owner: Stateful, rules: Mapping[str, str], rule: str) -> None:
        self._owner = owner
        self._rules = rules
        self._rule = rule

    def state_dict(self) -> dict[str, Any]:
        state = self._owner.state_dict()
        return {k: v for k, v in state.items() if self._rules.get(k, "kept") == self._rule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._owner.load_state_dict({**clone_state(self._owner.state_dict()), **state})


def mean_of_states(
    states: Sequence[Any], weights: Sequence[float], *, accumulate: str = "float64"
) -> Any:
    """The mean of nested states: tensors as in `average`, all else must agree.

    Args:
        states: of the members, alike in all but their tensors' values.
        weights: of the members; they need not sum to 1.
        accumulate: see `average`.

    Raises:
        ValueError: states differ in something that has no mean.
    """
    tensors, others = zip(*(split_state(state) for state in states), strict=True)
    check_agreement(others)
    return joined_state(states[0], weighted_mean(tensors, weights, accumulate=accumulate))


def split_state(state: Any) -> tuple[State, dict[str, Any]]:
    """The tensors of a nested state, and all else in it, by their place."""
    tensors: State = {}
    others: dict[str, Any] = {}
    for place, leaf in _leaves(state, ""):
        (tensors if isinstance(leaf, Tensor) else others)[place] = leaf
    return tensors, others


def check_agreement(members: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if members differ in what `split_state` returned second."""
    for number, member in enumerate(members[1:], start=1):
        for place in [*members[0], *member]:
            first, other = members[0].get(place), member.get(place)
            if type(first) is not type(other) or first != other:
                raise ValueError(
                    f"state {place[1:]} is {first!r} for member 0 but {other!r} for member "
                    f'{number}; what is "averaged" must agree in all that is no tensor'
                )


def joined_state(state: Any, tensors: State, place: str = "") -> Any:
    """A nested state with other tensors in the places of its own."""
    if isinstance(state, dict):
        return {key: joined_state(x, tensors, f"{place}/{key}") for key, x in state.items()}
    if isinstance(state, list | tuple):
        kind = type(state)
        return kind(joined_state(x, tensors, f"{place}/{i}") for i, x in enumerate(state))
    return tensors.get(place, state)


def _leaves(state: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, item in state.items():
            yield from _leaves(item, f"{place}/{key}")
    elif isinstance(state, list | tuple):
        for number, item in enumerate(state):
            yield from _leaves(item, f"{place}/{number}")
    else:
        yield place, state
