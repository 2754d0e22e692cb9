"""What happens around a training step: learning rate, averaging, evaluation, signals."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.engine.modes import undisturbed
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import Writer

logger = logging.getLogger(__name__)


class LRHook(HookBase):
    """Sets the learning rate of each step from the member's own iteration t.

    Args:
        multiplier: t -> factor of each parameter group's `initial_lr`; see `solver.lr_multiplier`.
    """

    def __init__(self, multiplier: Callable[[int], float]) -> None:
        self.multiplier = multiplier

    @property
    def name(self) -> str:
        return "lr"

    def before_step(self) -> None:
        factor = self.multiplier(self.trainer.position.t)
        groups = self.trainer.optimizer.param_groups
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        self.trainer.storage.put_scalar("lr", groups[0]["lr"], smoothing_hint=False)


class IMWAHook(HookBase):
    """Lets IMWA swap members and average them around the trainer's steps.

    Args:
        imwa: of members in turn, or at once. Those at once cannot be saved yet: a checkpoint holds
            the state of one rank, and with it only one of them.
    """

    def __init__(self, imwa: IMWA | ParallelIMWA) -> None:
        self.imwa = imwa

    @property
    def name(self) -> str:
        return "imwa"

    def before_step(self) -> None:
        self.imwa.before_step(self.trainer.iter)

    def after_step(self) -> None:
        self.imwa.after_step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        if self.trainer.ranks.members > 1:
            raise NotImplementedError(
                "members trained at once cannot be saved: a checkpoint holds one of them"
            )
        return self.imwa.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.imwa.load_state_dict(state)


class Evaluations:
    """The evaluations of a run in the order of their global steps.

    Attributes:
        records: dicts with `model` ("student" or "teacher"), `stage` ("member", "average", or
            "final" for the last average), `episode`, `member` (None for averages), `global_step`,
            `t` (own iteration that was just done) and `metrics` (name to number).
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
    """Evaluates student and teacher at the end of members, or of episodes.

    Stage "member" comes before IMWAHook in the trainer's list, while the member is still live;
    stage "average" after IMWAHook and after the checkpoint. If a run stops between that checkpoint
    and the end of the evaluation, the evaluation is made up for when the run resumes.

    Args:
        name: key of the hook's state.
        evaluate: model in eval mode -> metrics, the same on every rank. For stage "average" it may
            raise `EvaluationInterruptedError` (see `SignalHook.poll`).
        evaluations: receives the records; shared by the hooks of a run.
        stage: "member" or "average".
        period: episodes between two evaluations; the last episode is always evaluated, and 0
            evaluates only that one.
        writers: receive a row with all metrics of an evaluation.
    """

    def __init__(
        self,
        name: str,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        evaluations: Evaluations,
        *,
        stage: str,
        period: int = 1,
        writers: Sequence[Writer] = (),
    ) -> None:
        if stage not in ("member", "average"):
            raise ValueError(f"stage = {stage!r} is not allowed (choose member or average)")
        if period < 0:
            raise ValueError(f"period = {period} is not allowed (must be at least 0)")
        self._name = name
        self._evaluate = evaluate
        self._evaluations = evaluations
        self._stage = stage
        self._period = period
        self._writers = writers

    @property
    def name(self) -> str:
        return self._name

    def before_train(self) -> None:
        # A member's weights are gone after its last step, but its record is in that checkpoint.
        if self._stage == "member" or self.trainer.start_iter == 0:
            return
        last = self.trainer.schedule.position(self.trainer.start_iter - 1)
        done = {record["global_step"] for record in self._own_records()}
        if self._is_due(last) and last.global_step not in done:
            logger.info(
                "evaluating global step %d, which its checkpoint precedes", last.global_step + 1
            )
            self._run(last)

    def after_step(self) -> None:
        position = self.trainer.position
        if self._is_due(position):
            self._run(position)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self._own_records()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {(r["global_step"], r["model"]) for r in self._own_records()}
        records = state.get("records", [])
        self._evaluations.add([r for r in records if (r["global_step"], r["model"]) not in known])

    def _own_records(self) -> list[dict[str, Any]]:
        stages = ("member",) if self._stage == "member" else ("average", "final")
        return self._evaluations.of_stages(stages)

    def _is_due(self, position: Position) -> bool:
        if not (position.ends_member if self._stage == "member" else position.ends_episode):
            return False
        number = position.episode + 1
        is_last = number == self.trainer.schedule.episodes
        return is_last or (self._period > 0 and number % self._period == 0)

    def _run(self, position: Position) -> None:
        method = self.trainer.method
        models = method.evaluated_models(position.t)
        try:
            with undisturbed(*models.values()), torch.no_grad():
                metrics = {
                    name: {key: float(value) for key, value in self._evaluate(model).items()}
                    for name, model in models.items()
                }
        except EvaluationInterruptedError:
            if self._stage == "member":
                raise  # the member is about to be swapped out: it cannot be made up for
            logger.warning("evaluation of global step %d was interrupted", position.global_step + 1)
            return
        records = [self._record(name, position, values) for name, values in metrics.items()]
        self._evaluations.add(records)
        if self.trainer.ranks.run.is_main:
            self._write(position, metrics)

    def _record(self, model: str, position: Position, metrics: dict[str, float]) -> dict[str, Any]:
        is_last = position.episode == self.trainer.schedule.episodes - 1
        return {
            "model": model,
            "stage": "final" if self._stage == "average" and is_last else self._stage,
            "episode": position.episode,
            "member": self.trainer.member if self._stage == "member" else None,
            "global_step": position.global_step,
            "t": position.t,
            "metrics": metrics,
        }

    def _write(self, position: Position, metrics: dict[str, dict[str, float]]) -> None:
        row: dict[str, Any] = {
            "iteration": position.global_step,
            "episode": position.episode,
            "member": self.trainer.member if self._stage == "member" else None,
            "t": position.t,
        }
        for model, values in metrics.items():
            row |= {f"{self._stage}/{model}/{key}": value for key, value in values.items()}
        for writer in self._writers:
            writer.write(row)


class SignalHook(HookBase):
    """Ends the run cleanly on SIGTERM or SIGINT: the step finishes, then a checkpoint, then out.

    The last hook of the list. Handlers only set a flag; at the end of each step all ranks agree on
    it. A second signal ends the process at once. Previous handlers are put back when training ends
    and, if they are functions of the caller, called with the signal that was received.

    Args:
        checkpoint: writes a checkpoint of the step that just ended, on all ranks.
        signals: what to catch.

    Attributes:
        received: number of the signal that ends the run, None if there was none.
    """

    def __init__(
        self,
        checkpoint: Callable[[], object],
        *,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        self._checkpoint = checkpoint
        self._signals = tuple(signals)
        self._previous: dict[int, Any] = {}
        self._flag: int | None = None
        self.received: int | None = None

    @property
    def name(self) -> str:
        return "signals"

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 128 + signal (SIGTERM 143, SIGINT 130), else 0."""
        return 0 if self.received is None else 128 + self.received

    def poll(self) -> None:
        """Leave a long evaluation when a signal has come; evaluation loops call it once a batch.

        Under several ranks it is an exchange: every rank has to call it equally often.

        Raises:
            EvaluationInterruptedError: some rank was told to stop.
        """
        if self.trainer.ranks.run.any_true(self._flag is not None):
            raise EvaluationInterruptedError("a signal asked the run to stop")

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals are not handled: training does not run in the main thread")
            return
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)

    def after_step(self) -> None:
        if not self.trainer.ranks.run.any_true(self._flag is not None):
            return
        # Ranks that were not signaled themselves exit with the number that another one got.
        self.received = max(number or 0 for number in self.trainer.ranks.run.all_gather(self._flag))
        logger.warning(
            "%s received: stopping after global step %d",
            signal.Signals(self.received).name,
            self.trainer.iter + 1,
        )
        self._checkpoint()
        self.trainer.stop_requested = True

    def after_train(self) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        handler = previous.get(self._flag) if self._flag is not None else None
        # Python's own SIGINT handler would raise KeyboardInterrupt in a run that ended cleanly.
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self._flag, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._flag is not None:
            # Not sys.exit: clean-up that hangs may be why there is a second signal.
            os._exit(128 + number)
        self._flag = number
