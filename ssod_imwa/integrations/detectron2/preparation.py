"""What IMWAHook sees to in a detectron2 trainer before training begins."""

from __future__ import annotations

from typing import Any

from detectron2.engine import TrainerBase
from detectron2.engine import hooks as d2_hooks
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

from ssod_imwa.averaging.episodes import EpisodeSchedule


def plan_rates(trainer: TrainerBase, schedule: EpisodeSchedule) -> None:
    """Stretch schedules that are functions of progress over a member's T iterations.

    `hooks.LRScheduler(scheduler=ParamScheduler)`, as LazyConfig trainers have it, would take the
    trainer's length when training begins, and that is M * T by then.
    """
    for hook, scheduler in _schedulers(trainer):
        if isinstance(scheduler, ParamScheduler):
            optimizer = hook._optimizer or trainer.optimizer
            hook._scheduler = LRMultiplier(optimizer, scheduler, schedule.iterations)


def check_rates(trainer: TrainerBase, schedule: EpisodeSchedule) -> None:
    """Raise ValueError if a schedule is stretched over the steps of all members."""
    for _, scheduler in _schedulers(trainer):
        length = getattr(scheduler, "_max_iter", None)
        if length == len(schedule) and schedule.members > 1:
            raise ValueError(
                f"learning rates are planned for {length} steps, those of all members, but every "
                f"member has a schedule of its own, of {schedule.iterations} iterations (use "
                "IMWAHook.register, and a trainer whose SOLVER.MAX_ITER is the latter)"
            )


def _schedulers(trainer: TrainerBase) -> list[tuple[d2_hooks.LRScheduler, Any]]:
    return [
        (hook, hook._scheduler or getattr(trainer, "scheduler", None))
        for hook in trainer._hooks
        if isinstance(hook, d2_hooks.LRScheduler)
    ]
