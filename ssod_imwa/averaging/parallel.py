"""IMWA with the members side by side on the ranks of a distributed run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.batchnorm import warn_if_far_apart
from ssod_imwa.averaging.checks import check_coefficients, fingerprints
from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.exchange import BUCKET_BYTES, average_over_ranks, gather_over_ranks
from ssod_imwa.averaging.imwa_options import (
    Recompute,
    announce,
    check_options,
    read_coefficients,
)
from ssod_imwa.averaging.member_state import (
    Stateful,
    check_agreement,
    clone_state,
    entries,
    joined_state,
    split_state,
)
from ssod_imwa.averaging.members import Rule
from ssod_imwa.averaging.optimizer_state import (
    OptimizerStates,
    check_counters,
    joined_slots,
    split_slots,
)
from ssod_imwa.averaging.outer import TO_THE_MEAN, Outer, OuterStep
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.watched import WatchedWeights, floating_buffers
from ssod_imwa.averaging.weights import State, copy_

logger = logging.getLogger(__name__)


class ParallelIMWA:
    """Trains the M members of every episode at once, on M groups of the ranks of a run.

    Used like `IMWA`, with a schedule that says which of the members this rank's is::

        ranks = Ranks.of_run(members=M)
        schedule = EpisodeSchedule(T, episodes=E, members=M, only=ranks.member)
        imwa = ParallelIMWA(schedule, modules, ranks, optimizer=optimizer)
        for t in range(T):
            position = schedule.position(t)
            imwa.before_step(t)
            ...one optimizer step of position.member at its own iteration t, whose batch the ranks
               of ranks.batch may share...
            imwa.after_step(t)      # exchanges and averages at the end of an episode

    Wall time is 1/M of the serial order's and no member is stored. After an exchange all ranks hold
    the same bits, those of `IMWA` on as many ranks as share a batch; if it fails on any rank, no
    rank changes. In a common part all ranks train member 0 on the same batches, and its end is an
    average like every other, which leaves equal members as they are.

    Args:
        schedule: of this rank's member, `only` being it.
        modules: what is averaged, by name, not wrapped for data parallelism.
        ranks: who trains which of the M members.
        optimizer: holds the student's parameters.
        member_state: objects with a state of the member. Entries that are "averaged", see
            `MemberState`, are exchanged with the weights; "shared" ones are not allowed. A member
            that is dropped goes on with the state of the first good one.
        optimizer_state: "keep", "average" or "reset".
        bn: as in `IMWA`.
        recompute_bn: as in `IMWA`; must do the same on every rank.
        nonfinite: as in `IMWA`.
        accumulate: as in `IMWA`.
        coefficients: as in `IMWA`; a rule has to return the same on every rank, each of which holds
            all members while it is asked.
        outer: as in `IMWA`; every rank takes the same step.
        bucket_bytes: bytes of a member that travel in one message.

    Attributes:
        distances: as in `IMWA`, of the last member, on all ranks.

    Raises:
        ValueError: an option is unknown or at odds with another.
    """

    def __init__(
        self,
        schedule: EpisodeSchedule,
        modules: Mapping[str, nn.Module],
        ranks: Ranks,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        member_state: Mapping[str, Stateful] | None = None,
        optimizer_state: str = "keep",
        bn: str = "mean",
        recompute_bn: Recompute | None = None,
        nonfinite: str = "raise",
        accumulate: str = "float64",
        coefficients: Sequence[float] | Rule | None = None,
        outer: Outer = TO_THE_MEAN,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        check_options(
            optimizer=optimizer,
            optimizer_state=optimizer_state,
            bn=bn,
            recompute_bn=recompute_bn,
            nonfinite=nonfinite,
            accumulate=accumulate,
        )
        of_ranks = (schedule.only or 0, schedule.members) == (ranks.member, ranks.members)
        if schedule.turns != 1 or not of_ranks:
            raise ValueError(
                f"a schedule of member {schedule.only} of {schedule.members} is not allowed on "
                f"ranks of member {ranks.member} of {ranks.members} (give EpisodeSchedule(T, "
                "episodes=E, members=ranks.members, only=ranks.member))"
            )
        if optimizer_state == "carry":
            raise ValueError(
                'optimizer_state = "carry" is not allowed (no member precedes another; use "keep")'
            )
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes = {bucket_bytes} is not allowed (must be at least 1)")
        self.schedule = schedule
        self.ranks = ranks
        self.bn = bn
        self.nonfinite = nonfinite
        self.accumulate = accumulate
        self.optimizer = optimizer
        self.optimizer_state = optimizer_state
        self.bucket_bytes = bucket_bytes
        self._recompute = recompute_bn
        self._member_state = dict(member_state or {})
        self._averaged_state = _averaged_entries(self._member_state)
        self._weights = WatchedWeights(modules)
        self._rule, fixed = read_coefficients(coefficients, ranks.members)
        self._coefficients = fixed or [1.0] * ranks.members
        self.outer = outer
        self._outer = None if outer.is_mean else OuterStep(modules, outer, accumulate=accumulate)
        self.distances: dict[str, float] = {}
        # One member as far as this process is concerned: only "reset" does anything here.
        self._optimizer = (
            None if optimizer is None else OptimizerStates(optimizer, optimizer_state, 1)
        )
        announce(schedule, optimizer_state)

    def before_step(self, step: int) -> None:
        """Check, at an episode's first step, that all ranks begin with the same weights."""
        position = self.schedule.position(step)
        if not position.starts_member:
            return
        self._weights.check_frozen()
        if self._optimizer is not None and position.episode == 0:
            self._optimizer.begin_run()
        if self._outer is not None and position.members > 1:
            self._outer.begin_episode(self._weights.live())
        self._check_equal(f"at the start of episode {self.schedule.number(position.episode)}")

    def after_step(self, step: int) -> bool:
        """At an episode's end, replace every member by their average.

        Returns:
            Whether the live models have just become an average.

        Raises:
            FloatingPointError: a member is not finite.
            ValueError: members cannot be averaged, or a frozen parameter has changed.
            RuntimeError: another rank failed; or the averages differ between ranks.
        """
        position = self.schedule.position(step)
        if not position.ends_episode:
            return False
        self._weights.clear_gradients()
        live = self._weights.live()
        good = self._good_members(position, live)
        parted = position.members > 1
        weights = self._weigh(live, good, self._rule if parted else None)
        mean = self._average(live, weights, good)
        if len(good) < self.ranks.members:
            self._replace_states(good)
        slots = self._average_slots(weights)
        states = self._average_states(weights)
        is_good = parted and self.ranks.member in good
        distances = self._weights.distances(live, mean) if is_good else {}
        self.distances = self.ranks.exchange.all_gather(distances)[-1]
        if self._outer is not None and parted:
            mean |= self._outer.moved(mean)
        copy_(live, mean)
        if self._outer is not None and parted:
            self._outer.end_episode()
        if self._optimizer is not None:
            self._optimizer.end_alone()
        if slots is not None and self.optimizer is not None:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        for name, state in states.items():
            self._averaged_state[name].load_state_dict(state)
        if self._recompute is not None and parted:
            self._recompute(self._weights.modules)
        self._agree(live)
        self._check_equal(f"after the average of episode {self.schedule.number(position.episode)}")
        return True

    def replaces(self, position: Position) -> bool:
        """Whether `after_step` leaves other live weights than training did."""
        return position.ends_episode and position.members > 1

    def _good_members(self, position: Position, live: State) -> list[int]:
        """Members that are finite on all their ranks; raises the same on every rank."""
        error: Exception | None = None
        try:
            self._weights.check_frozen()
        except ValueError as changed:
            error = changed
        self.ranks.run.raise_together(error)
        report = (self.ranks.member, self._weights.diverged(live)[:1])
        reports = self.ranks.run.all_gather(report)
        diverged = {member: names[0] for member, names in reports if names}
        good = [member for member in range(self.ranks.members) if member not in diverged]
        for member, name in sorted(diverged.items()):
            episode = self.schedule.number(position.episode)
            where = f"{name} of member {member + 1} is not finite at the end of episode {episode}"
            if self.nonfinite == "raise" or not good:
                fix = 'or drop it with nonfinite = "drop"' if good else "no member is left"
                raise FloatingPointError(f"{where}; lower the learning rate, {fix}")
            logger.warning("%s; it is left out of the average", where)
        return good

    def _weigh(self, live: State, good: list[int], rule: Rule | None) -> list[float]:
        """The weight of every member, 0 where it is not good."""
        if rule is None:
            of_good = [self._coefficients[member] for member in good]
        else:
            members = gather_over_ranks(live, self.ranks.exchange)
            of_good = check_coefficients(rule([members[member] for member in good]), len(good))
        weights = [0.0] * self.ranks.members
        for member, weight in zip(good, of_good, strict=True):
            weights[member] = weight
        if not any(weights):
            raise FloatingPointError(
                f"members {good}, which alone are finite, have the coefficients {of_good}; none is "
                "positive"
            )
        return weights

    def _agree(self, live: State) -> None:
        """Average what data parallelism leaves each rank of its own: running statistics.

        After the average over members, as in `IMWA`, so that sums are rounded in the same order.
        """
        if self.ranks.batch.size == 1:
            return
        buffers = floating_buffers(self._weights.modules, live)
        mean = average_over_ranks(
            buffers, self.ranks.batch, run=self.ranks.run, accumulate=self.accumulate
        )
        copy_(buffers, mean)

    def _average(self, live: State, weights: list[float], good: list[int]) -> State:
        mean = self._mean(live, weights)
        statistics = gather_over_ranks(self._weights.batchnorm(live), self.ranks.exchange)
        if self.bn == "keep":
            mean.update(statistics[good[-1]])
        elif self.bn == "mean" and self.ranks.run.is_main:
            warn_if_far_apart([statistics[member] for member in good])
        return mean

    def _average_slots(self, weights: list[float]) -> dict[Any, dict[str, Any]] | None:
        if self.optimizer is None or self.optimizer_state != "average":
            return None
        state = self.optimizer.state_dict()["state"]
        moments, others = split_slots(state)
        self._check_members(check_counters, others, weights)
        return joined_slots(state, self._mean(moments, weights))

    def _average_states(self, weights: list[float]) -> dict[str, Any]:
        """What follows of the entries that are averaged, by the name of their owner."""
        means = {}
        for name, owner in self._averaged_state.items():
            state = owner.state_dict()
            tensors, others = split_state(state)
            self._check_members(check_agreement, others, weights)
            means[name] = joined_state(state, self._mean(tensors, weights))
        return means

    def _check_members(
        self, check: Callable[[list[Any]], None], mine: Any, weights: list[float]
    ) -> None:
        """Check what the averaged members have; raises on every rank."""
        theirs = self.ranks.exchange.all_gather(clone_state(mine, device="cpu"))
        error: Exception | None = None
        try:
            check([value for value, weight in zip(theirs, weights, strict=True) if weight])
        except ValueError as different:
            error = different
        self.ranks.run.raise_together(error)

    def _mean(self, state: State, weights: list[float]) -> State:
        """The mean of the members, on every rank."""
        return average_over_ranks(
            state,
            self.ranks.exchange,
            run=self.ranks.run,
            weights=weights,
            accumulate=self.accumulate,
            bucket_bytes=self.bucket_bytes,
        )

    def _replace_states(self, good: list[int]) -> None:
        """Give dropped members the states of the first good one; theirs may not be finite.

        Nor whole, which those that are averaged have to be, although they do not count.
        """
        owners: dict[str, Any] = dict(self._member_state)
        if self.optimizer is not None and self.optimizer_state in ("keep", "average"):
            owners["optimizer"] = self.optimizer
        mine = {n: clone_state(owner.state_dict(), device="cpu") for n, owner in owners.items()}
        member = self.ranks.member
        states = self.ranks.exchange.all_gather(mine if member == good[0] else None)
        if member not in good:
            for name, owner in owners.items():
                owner.load_state_dict(states[good[0]][name])

    def _check_equal(self, when: str) -> None:
        first, *others = self.ranks.run.all_gather(fingerprints(self._weights.live()))
        for rank, other in enumerate(others, start=1):
            if differing := [name for name in first if first[name] != other.get(name)]:
                raise RuntimeError(
                    f"{differing[0]} differs between ranks 0 and {rank} {when}; all ranks must "
                    "begin with the same weights and buffers"
                )

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs besides its live models, optimizer and member state.

        In the middle of an episode ranks hold different members, so each saves its own.
        """
        return {
            "settings": self._settings(),
            "weights": self._weights.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "outer": None if self._outer is None else self._outer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken on the same rank.

        Raises:
            ValueError: the state is of another schedule.
        """
        for name, value in self._settings().items():
            if (saved := state["settings"].get(name)) != value:
                raise ValueError(f"{name} is {value!r} but was {saved!r} when the state was saved")
        self._weights.load_state_dict(state["weights"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"], live=self._weights.live())

    def _settings(self) -> dict[str, Any]:
        return {
            "iterations": self.schedule.iterations,
            "episodes": self.schedule.episodes,
            "members": self.schedule.members,
            "start": self.schedule.start,
            "lengths": self.schedule.lengths and list(self.schedule.lengths),
            "optimizer_state": self.optimizer_state,
            "has_optimizer": self._optimizer is not None,
            "outer": list(astuple(self.outer)),
        }


def _averaged_entries(owners: Mapping[str, Stateful]) -> dict[str, Stateful]:
    for name, owner in owners.items():
        if entries(owner, "shared") is not None:
            raise ValueError(
                f'{name} has "shared" state, which is not allowed for members at once (no member '
                "precedes another)"
            )
    averaged = {name: entries(owner, "averaged") for name, owner in owners.items()}
    return {name: part for name, part in averaged.items() if part is not None}
