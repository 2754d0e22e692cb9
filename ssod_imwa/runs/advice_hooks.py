"""Hooks that measure around each average and say whether averaging pays."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import nn

from ssod_imwa.averaging.batchnorm import statistics_names
from ssod_imwa.engine.evaluation import Evaluations
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.runs.advice import TREND, AverageNumbers, advise, measured_gain
from ssod_imwa.runs.imwa import batches_in_turn, build_recomputation
from ssod_imwa.runs.results import Evaluation
from ssod_imwa.task import Batches, Recompute, Task

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module], float]


class MemberLossHook(HookBase):
    """Measures each member at its end; belongs before IMWAHook, while the member is live.

    Args:
        loss: of a model, see `Task.build_training_loss`.

    Attributes:
        ends: loss and learning rate of the members of this episode that this process has trained,
            by number.
        highest_rate: of all steps so far.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.ends: dict[int, tuple[float, float]] = {}
        self.highest_rate = 0.0

    @property
    def name(self) -> str:
        return "member losses"

    @property
    def shipped(self) -> tuple[str, nn.Module]:
        """The model that would be shipped now, and its name."""
        models = self.trainer.method.evaluated_models(self.trainer.position.t)
        return list(models.items())[-1]

    def after_step(self) -> None:
        rate = max(group["lr"] for group in self.trainer.optimizer.param_groups)
        self.highest_rate = max(self.highest_rate, rate)
        if self.trainer.position.ends_member:
            is_gone = self.trainer.has_dropped
            end = math.nan if is_gone else self.loss(self.shipped[1]), rate
            self.ends[self.trainer.position.member] = end

    def state_dict(self) -> dict[str, Any]:
        ends = {member: list(end) for member, end in self.ends.items()}
        return {"ends": ends, "highest_rate": self.highest_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ends = {member: (end[0], end[1]) for member, end in state.get("ends", {}).items()}
        self.highest_rate = state.get("highest_rate", 0.0)


class AverageLossHook(HookBase):
    """Measures each average and records `advice/...`.

    Belongs after IMWAHook and before the hook that writes rows. An episode of one member has
    nothing to say. The numbers are of the model that is shipped: the student, or a teacher that has
    begun.

    Args:
        members: measured the members.
        recompute: re-estimates batch norms; None if every average's are re-estimated anyway.

    Attributes:
        course: numbers of the last averages.
        is_new: whether the last of them is not yet spoken of.
    """

    def __init__(self, members: MemberLossHook, recompute: Recompute | None) -> None:
        self._members = members
        self._recompute = recompute
        self.course: list[AverageNumbers] = []
        self.is_new = False

    @property
    def name(self) -> str:
        return "average losses"

    def after_step(self) -> None:
        if not self.trainer.position.ends_episode:
            return
        ranks = self.trainer.ranks.run.all_gather((self._members.ends, self._members.highest_rate))
        self._members.ends = {}
        losses = _member_losses(ends for ends, _ in ranks)
        if len(losses) < 2:
            return
        name, model = self._members.shipped
        # Members may have rates of their own: the noisiest says what there is to remove.
        rate = max(rate for ends, _ in ranks for _, rate in ends.values())
        numbers = AverageNumbers(
            members=sum(losses.values()) / len(losses),
            worst=max(losses.values()),
            average=self._members.loss(model),
            recomputed=self._recomputed_loss(model),
            distance=self._distance(name),
            rate=rate / (max(highest for _, highest in ranks) or 1.0),
        )
        for key, value in numbers.row().items():
            self.trainer.storage.put_scalar(key, value, smoothing_hint=False)
        self.course = [*self.course, numbers][-2 * TREND :]
        self.is_new = True

    def _distance(self, name: str) -> float | None:
        value, step = self.trainer.storage.latest().get(f"imwa/distance-{name}", (None, -1))
        return value if step == self.trainer.iter else None

    @torch.no_grad()
    def _recomputed_loss(self, model: nn.Module) -> float | None:
        """The loss with batch norms re-estimated, which are then put back."""
        if self._recompute is None or not statistics_names({"": model}):
            return None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # Some detectors count in training mode what their losses are divided by.
        state = copy.deepcopy(self.trainer.method.state_dict())
        try:
            self._recompute({"model": model})
            if all(torch.equal(x, buffers[name]) for name, x in model.named_buffers()):
                return None  # frozen ones are not re-estimated
            return self._members.loss(model)
        finally:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            self.trainer.method.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        return {"course": [list(astuple(numbers)) for numbers in self.course]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.course = [AverageNumbers(*values) for values in state.get("course", [])]


def _member_losses(ranks: Iterable[Mapping[int, tuple[float, float]]]) -> dict[int, float]:
    """Of each member the mean over the processes that trained it: batch norms are their own."""
    by_member: dict[int, list[float]] = {}
    for ends in ranks:
        for member, (loss, _) in ends.items():
            if math.isfinite(loss):  # else it has diverged and is not averaged either
                by_member.setdefault(member, []).append(loss)
    return {member: sum(losses) / len(losses) for member, losses in by_member.items()}


class AdviceHook(HookBase):
    """Says what the numbers of an average mean; belongs after the evaluation of averages.

    Args:
        averages: measured them.
        evaluations: of the run, which may say what the average gained on test images.
    """

    def __init__(self, averages: AverageLossHook, evaluations: Evaluations) -> None:
        self._averages = averages
        self._evaluations = evaluations

    @property
    def name(self) -> str:
        return "advice"

    def after_step(self) -> None:
        is_new, self._averages.is_new = self._averages.is_new, False
        if not is_new or not self.trainer.ranks.run.is_main:
            return
        episode = self.trainer.position.episode
        evaluations = [Evaluation(**record) for record in self._evaluations.records]
        advice = advise(self._averages.course, measured=measured_gain(evaluations, episode))
        number = self.trainer.schedule.number(episode)
        logger.info("average of episode %d: %s", number, advice.text)


class RetainedBatches:
    """The first batches of a run, read when they are needed and then kept in memory.

    Args:
        batches: of the run.
        images: of the stream "labeled", that they hold at least.
    """

    def __init__(self, batches: Batches, images: int) -> None:
        self._batches = batches
        self.count = -(-images // batches.sizes["labeled"])
        self._retained: list[Any] = []

    @property
    def sizes(self) -> Mapping[str, int]:
        """See `Batches`."""
        return self._batches.sizes

    def __call__(self, start: int) -> Iterator[Any]:
        if not self._retained:
            self._retained = list(itertools.islice(self._batches(0), self.count))
        return iter(self._retained[start:])


class AdviceHooks(NamedTuple):
    """Where the hooks of advice belong."""

    before_average: Sequence[HookBase] = ()
    after_average: Sequence[HookBase] = ()
    after_evaluation: Sequence[HookBase] = ()


def build_advice(
    task: Task, trainer: Trainer, batches: Batches, evaluations: Evaluations
) -> AdviceHooks:
    """The hooks of IMWA.ADVISE; none if it is 0 or one member trains.

    Args:
        task: of the run.
        trainer: of the run.
        batches: what it reads.
        evaluations: of the run.
    """
    settings = task.cfg.IMWA
    if not settings.ADVISE or settings.MEMBERS == 1:
        return AdviceHooks()
    recompute = None
    if settings.BN != "recompute":
        retained = RetainedBatches(batches_in_turn(task, trainer, batches), settings.ADVISE)
        count = min(retained.count, task.cfg.SOLVER.MAX_ITER)
        recompute = build_recomputation(task, retained, count=count)
    members = MemberLossHook(task.build_training_loss(settings.ADVISE))
    averages = AverageLossHook(members, recompute)
    return AdviceHooks([members], [averages], [AdviceHook(averages, evaluations)])
