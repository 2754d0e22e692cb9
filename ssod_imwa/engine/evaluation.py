"""When models are evaluated, and the evaluations of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.engine.modes import undisturbed
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import Writer
from ssod_imwa.errors import NonFiniteError

logger = logging.getLogger(__name__)

STAGES = ("running", "member", "average", "lawa")


class Evaluations:
    """The evaluations of a run in the order of their global steps.

    Attributes:
        records: dicts with `model` ("student" or "teacher"), `stage` ("running" inside an
            episode, "member" at a member's end, "average", "final" for the last average, or "lawa"
            for a mean of the last ones),
            `episode`, `member` (None for averages), `global_step`, `t` (own iteration that was just
            done) and `metrics` (name to number).
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Put records where their global step belongs."""
        self.records = sorted([*self.records, *records], key=lambda record: record["global_step"])

    def of_stages(self, stages: Sequence[str]) -> list[dict[str, Any]]:
        """The records of some stages."""
        return [record for record in self.records if record["stage"] in stages]


class EvaluationInterruptedError(Exception):
    """An evaluation was left because the run has to stop; it is made up for at resume."""


class EvaluationHook(HookBase):
    """Evaluates student and teacher: every few own iterations, at ends of members, or of episodes.

    Stages "running" and "member" come before IMWAHook in the trainer's list, while the member is
    still live; stages "average" and "lawa" after IMWAHook and after the checkpoint. If a run stops
    between a checkpoint and the end of the evaluation, the evaluation is made up for when the run
    resumes, as long as the models are still those of the step.

    Args:
        name: key of the hook's state.
        evaluate: model in eval mode -> metrics, the same on every rank that has this model. Except
            for stage "member" it may raise `EvaluationInterruptedError` (see `SignalHook.poll`).
        evaluate_to_end: the same without interruption, used where a lost evaluation could not be
            made up for; None takes `evaluate`.
        evaluations: receives the records; shared by the hooks of a run.
        stage: "running", "member", "average" or "lawa".
        period: own iterations ("running", 0 for never) or episodes between two evaluations; the
            last episode is always evaluated, and 0 evaluates only that one.
        writers: receive a row with all metrics of an evaluation.
        instead: hooks that evaluate the same weights, of averages where they are what was trained;
            where one of them is due, this one is not.
        replaces: whether other weights than were trained follow the step at a position; the default
            is for several members.
        weights: inside it the live models have the weights to evaluate.
    """

    is_of_run = True

    def __init__(
        self,
        name: str,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        evaluations: Evaluations,
        *,
        stage: str,
        period: int = 1,
        writers: Sequence[Writer] = (),
        instead: Sequence[EvaluationHook] = (),
        replaces: Callable[[Position], bool] = lambda at: at.ends_member and at.members > 1,
        weights: Callable[[], AbstractContextManager[object]] = nullcontext,
        evaluate_to_end: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage = {stage!r} is not allowed (must be one of {list(STAGES)})")
        if period < 0:
            raise ValueError(f"period = {period} is not allowed (must be at least 0)")
        self._name = name
        self._evaluate = evaluate
        self._evaluate_to_end = evaluate_to_end or evaluate
        self._evaluations = evaluations
        self._stage = stage
        self._period = period
        self._writers = writers
        self._instead = instead
        self._replaces = replaces
        self._weights = weights
        self._missing: Position | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def _is_of_averages(self) -> bool:
        return self._stage in ("average", "lawa")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0:
            return
        last = self.trainer.schedule.position(self.trainer.start_iter - 1)
        # The record of such a step is in that checkpoint.
        if self._stage == "member" or (self._stage == "running" and self._replaces(last)):
            return
        done = {record["global_step"] for record in self._stage_records()}
        if self.is_due(last) and last.global_step not in done:
            self._missing = last
        if self._is_of_averages:  # behind the writers, and perhaps there is no step
            self._make_up()

    def before_step(self) -> None:
        self._make_up()

    def _make_up(self) -> None:
        missing, self._missing = self._missing, None
        if missing is not None:
            step = missing.global_step + 1
            logger.info("evaluating global step %d, which its checkpoint precedes", step)
            # To the end: training goes on from here, and the weights of that step are gone.
            self._run(missing, self._evaluate_to_end)

    def after_step(self) -> None:
        position = self.trainer.position
        if self.is_due(position):
            swapped = self._stage == "running" and self._replaces(position)
            # A member that is dropped looks for no signal while others at once are evaluated.
            alone = self.trainer.may_drop and self.trainer.ranks.members > 1
            to_end = swapped or (alone and not self._is_of_averages)
            self._run(position, self._evaluate_to_end if to_end else self._evaluate)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self._stage_records()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def key(record: dict[str, Any]) -> tuple[Any, ...]:
            return record["global_step"], record["member"], record["model"]

        known = set(map(key, self._stage_records()))
        records = state.get("records", [])
        self._evaluations.add([record for record in records if key(record) not in known])

    def _stage_records(self) -> list[dict[str, Any]]:
        stages = ("average", "final") if self._stage == "average" else (self._stage,)
        return self._evaluations.of_stages(stages)

    def is_due(self, position: Position) -> bool:
        """Whether the step at this position ends with an evaluation."""
        if self._stage == "running":
            due = self._period > 0 and (position.t + 1) % self._period == 0
            return due and not any(hook.covers(position) for hook in self._instead)
        schedule = self.trainer.schedule
        if self._stage == "member":
            # One member is its own average: none is evaluated in a common part.
            ends = position.ends_member and position.members == schedule.members
        else:
            ends = position.ends_episode
        is_last = position.episode == schedule.episodes - 1
        number = schedule.number(position.episode)
        return ends and (is_last or (self._period > 0 and number % self._period == 0))

    def covers(self, position: Position) -> bool:
        """Whether it evaluates the weights that were trained in the step."""
        are_trained = self._stage != "average" or not self._replaces(position)
        return are_trained and self.is_due(position)

    def due_steps(self) -> list[int]:
        """The global steps that end with an evaluation, in ascending order."""
        schedule = self.trainer.schedule
        due = []
        for episode in range(schedule.episodes):
            first, end = schedule.bounds(episode)
            iterations = {end - 1}
            if self._stage == "running" and self._period > 0:
                period = self._period
                iterations |= set(range((first // period + 1) * period - 1, end, period))
            for member in range(schedule.turns_in(episode)):
                steps = (schedule.global_step(member, t) for t in sorted(iterations))
                due += [g for g in steps if self.is_due(schedule.position(g))]
        return due

    def _run(
        self, position: Position, evaluate: Callable[[nn.Module], Mapping[str, float]]
    ) -> None:
        # A member that was dropped has no weights; others that are trained at once have.
        is_gone = not self._is_of_averages and self.trainer.has_dropped
        models = {} if is_gone else self.trainer.method.evaluated_models(position.t)
        metrics: dict[str, dict[str, float]] = {}
        try:
            with self._weights(), undisturbed(*models.values()), torch.no_grad():
                metrics = {
                    name: {key: float(value) for key, value in evaluate(model).items()}
                    for name, model in models.items()
                }
        except EvaluationInterruptedError:
            if self._stage == "member":
                raise  # the member is about to be swapped out: it cannot be made up for
            logger.warning("evaluation of global step %d was interrupted", position.global_step + 1)
            return
        except NonFiniteError as error:
            if self._is_of_averages or not self.trainer.may_drop:
                raise
            self.trainer.drop_member(f"after global step {position.global_step + 1} {error}")
        for member, of_member in self._of_members(position, metrics):
            self._evaluations.add(
                [self._record(name, position, member, x) for name, x in of_member.items()]
            )
            if of_member and self.trainer.ranks.run.is_main:
                self._write(position, member, of_member)

    def _of_members(
        self, position: Position, metrics: dict[str, dict[str, float]]
    ) -> list[tuple[int | None, dict[str, dict[str, float]]]]:
        """The metrics of all models that were evaluated now, by member; None is an average."""
        if self._is_of_averages:
            return [(None, metrics)]
        gathered = self.trainer.ranks.exchange.all_gather((position.member, metrics))
        return gathered[: position.members]

    def _record(
        self, model: str, position: Position, member: int | None, metrics: dict[str, float]
    ) -> dict[str, Any]:
        is_last = position.episode == self.trainer.schedule.episodes - 1
        return {
            "model": model,
            "stage": "final" if self._stage == "average" and is_last else self._stage,
            "episode": position.episode,
            "member": member,
            "global_step": position.global_step,
            "t": position.t,
            "metrics": metrics,
        }

    def _write(
        self, position: Position, member: int | None, metrics: dict[str, dict[str, float]]
    ) -> None:
        row: dict[str, Any] = {
            "iteration": position.global_step,
            "episode": position.episode,
            "member": member,
            "t": position.t,
        }
        for model, values in metrics.items():
            row |= {f"{self._stage}/{model}/{key}": value for key, value in values.items()}
        for writer in self._writers:
            writer.write(row)
