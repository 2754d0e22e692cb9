"""IMWA with the members side by side on the ranks of a distributed run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.batchnorm import warn_if_far_apart
from ssod_imwa.averaging.checks import check_coefficients, fingerprints
from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.exchange import BUCKET_BYTES, average_over_ranks, gather_over_ranks
from ssod_imwa.averaging.imwa import Recompute, check_options
from ssod_imwa.averaging.member_state import (
    Stateful,
    check_agreement,
    clone_state,
    entries,
    joined_state,
    split_state,
)
from ssod_imwa.averaging.optimizer_state import (
    OptimizerStates,
    check_counters,
    joined_slots,
    split_slots,
)
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.watched import WatchedWeights
from ssod_imwa.averaging.weights import State, copy_

logger = logging.getLogger(__name__)


class ParallelIMWA:
    """Trains the M members of every episode at once, on M groups of the ranks of a run.

    Used like `IMWA`, with the member's own schedule and, for the same result as `IMWA`, the seeds
    and data of `ranks.member`, whose batch the ranks of `ranks.batch` may share::

        ranks = Ranks.of_run(members=M)
        imwa = ParallelIMWA(EpisodeSchedule(T, episodes=E), modules, ranks, optimizer=optimizer)
        for t in range(T):
            imwa.before_step(t)
            ...one optimizer step of member ranks.member at iteration t...
            imwa.after_step(t)      # exchanges and averages at the end of an episode

    Wall time is 1/M of the serial order's and no member is stored. After an exchange all ranks hold
    the same bits, those of `IMWA` in one process; if it fails on any rank, no rank changes.

    Args:
        schedule: of one member: iterations T, E episodes, members = 1.
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
        coefficients: weight of each member, summing to 1; None is 1/M each.
        bucket_bytes: bytes of a member that travel in one message.

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
        coefficients: Sequence[float] | None = None,
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
        if schedule.members != 1:
            raise ValueError(
                f"a schedule of {schedule.members} members is not allowed (each rank trains one; "
                "give EpisodeSchedule(T, episodes=E))"
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
        self._coefficients = (
            [1.0] * ranks.members
            if coefficients is None
            else check_coefficients(coefficients, ranks.members)
        )
        # One member as far as this process is concerned: only "reset" does anything here.
        self._optimizer = (
            None if optimizer is None else OptimizerStates(optimizer, optimizer_state, 1)
        )

    def before_step(self, step: int) -> None:
        """Check, at an episode's first step, that all ranks begin with the same weights."""
        position = self.schedule.position(step)
        if not position.starts_member:
            return
        self._weights.check_frozen()
        if self._optimizer is not None and position.episode == 0:
            self._optimizer.begin_run()
        self._check_equal(f"at the start of episode {position.episode}")

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
        weights = [
            value if member in good else 0.0 for member, value in enumerate(self._coefficients)
        ]
        if not any(weights):
            raise ValueError(f"members {good} have no positive coefficient in {self._coefficients}")
        mean = self._average(live, weights, good)
        slots = self._average_slots(weights)
        states = self._average_states(weights)
        copy_(live, mean)
        if self._optimizer is not None:
            self._optimizer.end_alone()
        if slots is not None and self.optimizer is not None:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        if len(good) < self.ranks.members:
            self._replace_states(good)
        for name, state in states.items():
            self._averaged_state[name].load_state_dict(state)
        if self._recompute is not None:
            self._recompute(self._weights.modules)
        self._check_equal(f"after the average of episode {position.episode}")
        return True

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
            where = (
                f"{name} of member {member} is not finite at the end of episode {position.episode}"
            )
            if self.nonfinite == "raise" or not good:
                fix = 'or drop it with nonfinite = "drop"' if good else "no member is left"
                raise FloatingPointError(f"{where}; lower the learning rate, {fix}")
            logger.warning("%s; it is left out of the average", where)
        return good

    def _average(self, live: State, weights: list[float], good: list[int]) -> State:
        of_member = dict(live)
        if self.ranks.batch.size > 1:
            # Data parallelism leaves running statistics of its own on every rank.
            of_member |= average_over_ranks(
                self._weights.floating_buffers(live),
                self.ranks.batch,
                run=self.ranks.run,
                accumulate=self.accumulate,
            )
        mean = self._mean(of_member, weights)
        statistics = gather_over_ranks(self._weights.batchnorm(of_member), self.ranks.exchange)
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
        """Give dropped members the states of the first good one; theirs may not be finite."""
        owners: dict[str, Any] = dict(self._member_state)
        if self.optimizer is not None and self.optimizer_state == "keep":
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken on the same rank.

        Raises:
            ValueError: the state is of another schedule or member.
        """
        for name, value in self._settings().items():
            if (saved := state["settings"].get(name)) != value:
                raise ValueError(f"{name} is {value!r} but was {saved!r} when the state was saved")
        self._weights.load_state_dict(state["weights"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])

    def _settings(self) -> dict[str, Any]:
        return {
            "iterations": self.schedule.iterations,
            "episodes": self.schedule.episodes,
            "members": self.ranks.members,
            "member": self.ranks.member,
            "optimizer_state": self.optimizer_state,
            "has_optimizer": self._optimizer is not None,
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
