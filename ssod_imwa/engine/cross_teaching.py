"""Members that label for each other: pseudo-labels from another member's teacher."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ssod_imwa.averaging.checks import is_averaged, nonfinite
from ssod_imwa.averaging.episodes import Position
from ssod_imwa.averaging.exchange import average_over_ranks
from ssod_imwa.averaging.member_state import clone_state
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.weights import State
from ssod_imwa.engine.trainer import HookBase


class CrossTeachingHook(HookBase):
    """Lends each member the teacher that another one had when members were averaged last.

    In every episode but the first, member m of M is lent the teacher of member (m + 1) mod M as it
    was at the end of the episode before, ahead of the average; the method says what it makes of it
    (`Method.cross_teach`). Nothing is lent of a teacher that was not ready or not finite then, or
    whose member was dropped.

    It stands before IMWAHook, which replaces the live teacher. M copies of the teacher wait at
    most, and one more labels. Where members are trained at once, a process keeps its own alone.

    Args:
        store_device: where copies wait: "same" as the teacher, or "cpu".
    """

    def __init__(self, store_device: str = "same") -> None:
        self._device = "cpu" if store_device == "cpu" else None
        self._waiting: dict[int, State] = {}  # of the last episode, by member
        self._finished: dict[int, State] = {}  # of this one
        self._lent: nn.Module | None = None
        self._place: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return "cross_teaching"

    def before_step(self) -> None:
        position = self.trainer.position
        place = (position.episode, position.member)
        if place == self._place:
            return
        self._place = place
        method = self.trainer.method
        state = self._waiting.get(self._lender(position))
        if state is None:
            method.other_teacher = None
            return
        if self._lent is None:
            self._lent = copy.deepcopy(method.teacher.model)
        self._lent.load_state_dict(state)
        method.other_teacher = self._lent

    def after_step(self) -> None:
        position = self.trainer.position
        if position.members == 1 or not position.ends_member:
            return
        self._waiting.pop(self._lender(position), None)  # nobody else is lent it
        is_last = position.episode + 1 == self.trainer.schedule.episodes
        if not is_last and (state := self._copy_of_teacher(position)) is not None:
            self._finished[position.member] = state
        if position.ends_episode:
            self._waiting, self._finished = self._exchanged(position), {}

    def _lender(self, position: Position) -> int:
        members: int = self.trainer.schedule.members
        return (position.member + 1) % members

    def _copy_of_teacher(self, position: Position) -> State | None:
        """A copy of the live teacher, None if it is worth nothing."""
        teacher, ranks = self.trainer.method.teacher, self.trainer.ranks
        state: State = teacher.model.state_dict()
        parameters = dict(teacher.model.named_parameters())
        if self.trainer.has_dropped or not teacher.ready(position.t) or nonfinite(parameters):
            return None
        if ranks.batch.size > 1:  # running statistics are each rank's own
            buffers = {n: x for n, x in state.items() if n not in parameters and is_averaged(x)}
            state = {**state, **average_over_ranks(buffers, ranks.batch)}
        copied: State = clone_state(dict(state), device=self._device)
        return copied

    def _exchanged(self, position: Position) -> dict[int, State]:
        """The teachers that will be lent here, of all members at the end of an episode."""
        ranks: Ranks = self.trainer.ranks
        if ranks.members == 1:
            return self._finished
        mine = self._finished.get(position.member)
        on_host = None if mine is None else clone_state(mine, device="cpu")
        lender = self._lender(position)
        state = ranks.exchange.all_gather(on_host)[lender]
        return {} if state is None else {lender: state}

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": self._waiting, "finished": self._finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # an inexact resume may begin with it
            return
        self._waiting = clone_state(state["waiting"], device=self._device)
        self._finished = clone_state(state["finished"], device=self._device)
        self._place = None
