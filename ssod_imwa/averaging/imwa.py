"""Iterative model weight averaging around any training loop (IMWA, arXiv 2404.16331)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.batchnorm import warn_if_far_apart
from ssod_imwa.averaging.checks import checksum
from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.exchange import average_over_ranks
from ssod_imwa.averaging.imwa_options import (
    Recompute,
    announce,
    check_options,
    read_coefficients,
)
from ssod_imwa.averaging.member_state import MemberState, Stateful
from ssod_imwa.averaging.members import MemberStore, Rule
from ssod_imwa.averaging.optimizer_state import OptimizerStates
from ssod_imwa.averaging.outer import TO_THE_MEAN, Outer, OuterStep
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.watched import WatchedWeights, floating_buffers
from ssod_imwa.averaging.weights import State, copy_, named_state

logger = logging.getLogger(__name__)


class IMWA:
    """Trains M members in turn, averages them at the end of every episode, and goes on from there.

    ::

        imwa = IMWA(schedule, {"student": student, "teacher": teacher}, optimizer=optimizer)
        for global_step in range(len(schedule)):
            position = schedule.position(global_step)
            imwa.before_step(global_step)
            ...one optimizer step of position.member at its own iteration position.t...
            if imwa.after_step(global_step):
                ...student and teacher are the averages of episode position.episode...

    Everything is changed in place, so optimizers and wrappers keep their references. An average is
    complete before anything is overwritten: if it fails, the live models are as they were. With
    M = 1 nothing is stored or averaged and training is bit for bit what it is without IMWA (unless
    `optimizer_state` is "reset").

    Where ranks share every batch, each forms the averages by itself. Then floating buffers, which
    data parallelism does not synchronize, are averaged over ranks, and all compare a checksum.

    Args:
        schedule: which member trains at which global step.
        modules: what is averaged, by name; module extra state is not.
        optimizer: holds the student's parameters.
        member_state: objects that every member has a state of: learning-rate schedulers, gradient
            scalers, queues of a method. Restored when the member comes back, unless the object
            says otherwise, see `MemberState`.
        store: "dict" keeps finished members (exact for any coefficients), "stream" their sum.
        store_device: "same" as the model, or "cpu".
        optimizer_state: "keep" per member, "average", "reset" or "carry"; see `OptimizerStates`.
            With momentum beta, beta^n of it is left after n steps: a matter of taste when an
            episode has thousands of steps, and not when it has tens.
        bn: batch-norm statistics after an average: the "mean" of the members', "recompute" by
            `recompute_bn`, or "keep" those of the last member.
        recompute_bn: given the averaged modules, re-estimates their statistics.
        nonfinite: "raise" if a member ends with NaN or infinity, or "drop" it and average the rest.
        accumulate: "float64" or "float32"; see `average`.
        coefficients: weight of each member, summing to 1; or a rule such as `soups.greedy` that
            returns them for the members' weights; None is 1/M each.
        outer: how far what is trained goes towards the average, with one member, too (then the
            average is the member); the default goes there and costs nothing. A common part is no
            episode of it.
        ranks: who shares the batches; members are trained in turn.

    Attributes:
        distances: after an average, how far the last member was from it, for each module; see
            `WatchedWeights.distances`. Empty with one member, or if the last one was dropped.

    Raises:
        ValueError: an option is unknown or at odds with another.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> schedule = EpisodeSchedule(4, episodes=2, members=2)
        >>> imwa = IMWA(schedule, {"model": model})
        >>> averaged = []
        >>> for g in range(len(schedule)):
        ...     imwa.before_step(g)
        ...     _ = nn.init.constant_(model.weight, g)
        ...     if imwa.after_step(g):
        ...         averaged.append(model.weight.item())
        >>> averaged
        [2.0, 6.0]
    """

    def __init__(
        self,
        schedule: EpisodeSchedule,
        modules: Mapping[str, nn.Module],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        member_state: Mapping[str, Stateful] | None = None,
        store: str = "dict",
        store_device: str = "same",
        optimizer_state: str = "keep",
        bn: str = "mean",
        recompute_bn: Recompute | None = None,
        nonfinite: str = "raise",
        accumulate: str = "float64",
        coefficients: Sequence[float] | Rule | None = None,
        outer: Outer = TO_THE_MEAN,
        ranks: Ranks = Ranks.alone(),
    ) -> None:
        if ranks.members > 1:
            raise ValueError(
                f"ranks for {ranks.members} members at once are not allowed (IMWA trains members "
                "in turn; use ParallelIMWA)"
            )
        check_options(
            optimizer=optimizer,
            optimizer_state=optimizer_state,
            bn=bn,
            recompute_bn=recompute_bn,
            nonfinite=nonfinite,
            accumulate=accumulate,
        )
        self.schedule = schedule
        self.optimizer_state = optimizer_state
        self.bn = bn
        self.nonfinite = nonfinite
        self.accumulate = accumulate
        self.ranks = ranks
        self._recompute = recompute_bn
        self._weights = WatchedWeights(modules)
        if callable(coefficients) and store != "dict":
            raise ValueError(
                f'a rule for coefficients with store = {store!r} is not allowed (use "dict"; a '
                "rule looks at every member)"
            )
        self._rule, fixed = read_coefficients(coefficients, schedule.members)
        self._store = MemberStore(
            store, device=store_device, accumulate=accumulate, coefficients=fixed
        )
        self._optimizer = (
            None
            if optimizer is None
            else OptimizerStates(optimizer, optimizer_state, schedule.members)
        )
        self._member_state = {
            name: MemberState(owner, schedule.members)
            for name, owner in (member_state or {}).items()
        }
        self.outer = outer
        self._outer = (
            None
            if outer.is_mean
            else OuterStep(modules, outer, device=store_device, accumulate=accumulate)
        )
        self._batchnorm: list[State] = []
        self._spoiled: list[int] = []
        self.distances: dict[str, float] = {}
        if schedule.members > 1:  # one member is plain training
            announce(schedule, optimizer_state)

    def before_step(self, global_step: int) -> None:
        """Remember, at an episode's first step, what its members begin with."""
        position = self.schedule.position(global_step)
        if not position.starts_member or position.member != 0:
            return
        self._weights.check_frozen()
        if self._optimizer is not None and position.episode == 0:
            self._optimizer.begin_run()
        if self._outer is not None and position.episode >= self.schedule.parting:
            self._outer.begin_episode(self._weights.live())
        if position.members == 1:
            return
        for state in self._states_of_members():
            if position.episode == self.schedule.parting:
                state.part()
            state.begin_episode()
        self._forget_members()
        self._store.remember_start(self._weights.live())
        self._weights.clear_gradients()

    def _states_of_members(self) -> list[OptimizerStates | MemberState]:
        optimizer = [] if self._optimizer is None else [self._optimizer]
        return [*optimizer, *self._member_state.values()]

    def after_step(self, global_step: int) -> bool:
        """At a member's end, store it and re-seed the next; at an episode's end, average.

        Returns:
            Whether the live models have just become an average.

        Raises:
            FloatingPointError: the member is not finite.
            ValueError: members cannot be averaged, or a frozen parameter has changed.
            RuntimeError: the episode's start was not seen; or the averages differ between ranks.
        """
        position = self.schedule.position(global_step)
        if not position.ends_member:
            return False
        self._weights.check_frozen()
        if position.members > 1:
            self._end_member(position)
        else:
            self._end_alone(position)
        if position.ends_episode:
            self._agree(position)
        return position.ends_episode

    def replaces(self, position: Position) -> bool:
        """Whether `after_step` leaves other live weights than training did."""
        moves = self._outer is not None and position.episode >= self.schedule.parting
        return position.ends_member and (position.members > 1 or moves)

    def _end_alone(self, position: Position) -> None:
        """At the end of an episode of one member, who is its own average."""
        if self._outer is not None and self.replaces(position):
            live = self._weights.live()
            moved = self._outer.moved(live)
            copy_({name: live[name] for name in moved}, moved)
            self._outer.end_episode()
        if self._optimizer is not None:
            self._optimizer.end_alone()

    def _end_member(self, position: Position) -> None:
        self._check_complete(position)
        self._weights.clear_gradients()
        live = self._weights.live()
        self._check_finite(position, live)
        if position.ends_episode:
            self._average(position, live)
        else:
            self._next_member(position, live)

    def _agree(self, position: Position) -> None:
        """Make the averages of ranks that share batches one and the same."""
        if self.ranks.batch.size == 1:
            return
        buffers = floating_buffers(self._weights.modules, self._weights.live())
        copy_(buffers, average_over_ranks(buffers, self.ranks.batch, accumulate=self.accumulate))
        self.ranks.run.assert_equal(
            checksum(named_state(self._weights.modules)),
            f"the averaged models of episode {self.schedule.number(position.episode)}",
        )

    def _check_complete(self, position: Position) -> None:
        seen = len(self._store.members) + len(self._spoiled)
        if seen != position.member or (self._store.start is None and not position.ends_episode):
            raise RuntimeError(
                f"member {position.member} ends at global step {position.global_step}, but {seen} "
                "members of its episode were seen; call before_step and after_step at every step, "
                "and load_state_dict when resuming"
            )

    def _check_finite(self, position: Position, live: State) -> None:
        diverged = self._weights.diverged(live)
        if not diverged:
            self._batchnorm.append(self._weights.batchnorm(live))
            return
        words = ", ".join(self.schedule.in_words(position))
        step = f"global step {position.global_step + 1} ({words})"
        where = f"{diverged[0]} is not finite after {step}"
        nothing_left = position.ends_episode and not self._store.members
        if self.nonfinite == "raise" or nothing_left:
            fix = "no member is left" if nothing_left else 'or drop it with nonfinite = "drop"'
            raise FloatingPointError(f"{where}; lower the learning rate, {fix}")
        logger.warning("%s; it is left out of the average", where)
        self._spoiled.append(position.member)

    def _next_member(self, position: Position, live: State) -> None:
        spoiled = position.member in self._spoiled
        if not spoiled:
            self._store.add(position.member, live)
        self._store.reseed_(live)
        for state in self._states_of_members():
            state.next_member(position.member, spoiled=spoiled)
        if position.member + 1 == self.schedule.members - 1:
            self._store.drop_start()

    def _average(self, position: Position, live: State) -> None:
        spoiled = position.member in self._spoiled
        mean, weights = self._store.average(
            None if spoiled else (position.member, live), self._rule
        )
        if self.bn == "keep":
            mean.update(self._batchnorm[-1])
        slots = None
        if self._optimizer is not None:
            slots = self._optimizer.averaged(weights, spoiled=spoiled, accumulate=self.accumulate)
        averaged = {
            name: state.averaged(weights, spoiled=spoiled, accumulate=self.accumulate)
            for name, state in self._member_state.items()
        }
        self.distances = {} if spoiled else self._weights.distances(live, mean)
        if self._outer is not None:
            mean |= self._outer.moved(mean)
        # From here on nothing is computed that could fail.
        copy_(live, mean)
        if self._outer is not None:
            self._outer.end_episode()
        if self._optimizer is not None:
            self._optimizer.end_episode(slots, spoiled=self._spoiled)
        for name, state in self._member_state.items():
            state.end_episode(position.member, averaged[name], spoiled=self._spoiled)
        if self.bn == "mean":
            warn_if_far_apart(self._batchnorm)
        self._forget_members()
        if self._recompute is not None:
            self._recompute(self._weights.modules)

    def _forget_members(self) -> None:
        self._store.clear()
        self._batchnorm = []
        self._spoiled = []

    def state_dict(self) -> dict[str, Any]:
        """All that `after_step` left outside the live models, optimizer and member state.

        Tensors and plain values only, so it loads with `weights_only=True`. The tensors are not
        copied: serialize them before the next step.
        """
        return {
            "settings": self._settings(),
            "weights": self._weights.state_dict(),
            "store": self._store.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "member_state": {n: owned.state_dict() for n, owned in self._member_state.items()},
            "outer": None if self._outer is None else self._outer.state_dict(),
            "batchnorm": list(self._batchnorm),
            "spoiled": list(self._spoiled),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the models and the optimizer beforehand.

        Raises:
            ValueError: the state is of a run with another schedule or other ways of storing.
        """
        for name, value in self._settings().items():
            if (saved := state["settings"].get(name)) != value:
                raise ValueError(f"{name} is {value!r} but was {saved!r} when the state was saved")
        live = self._weights.live()
        self._weights.load_state_dict(state["weights"])
        self._store.load_state_dict(state["store"], live=live)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        for name, owned in self._member_state.items():
            owned.load_state_dict(state["member_state"][name])
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"], live=live)
        self._batchnorm = [
            {name: tensor.to(live[name].device, copy=True) for name, tensor in member.items()}
            for member in state["batchnorm"]
        ]
        self._spoiled = list(state["spoiled"])

    def _settings(self) -> dict[str, Any]:
        return {
            "iterations": self.schedule.iterations,
            "episodes": self.schedule.episodes,
            "members": self.schedule.members,
            "start": self.schedule.start,
            "lengths": self.schedule.lengths and list(self.schedule.lengths),
            "store": self._store.kind,
            "optimizer_state": self.optimizer_state,
            "has_optimizer": self._optimizer is not None,
            "member_state": sorted(self._member_state),
            "accumulate": self.accumulate,
            "outer": list(astuple(self.outer)),
        }
