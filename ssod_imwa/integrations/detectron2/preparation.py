"""What IMWAHook sees to in a detectron2 trainer before training begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.engine import HookBase, TrainerBase
from detectron2.engine import hooks as d2_hooks
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.integrations.detectron2.averages import Average
from ssod_imwa.integrations.detectron2.trainer_parts import unwrapped

BEFORE = (d2_hooks.LRScheduler,)
AFTER = (
    d2_hooks.PreciseBN,
    d2_hooks.PeriodicCheckpointer,
    d2_hooks.BestCheckpointer,
    d2_hooks.EvalHook,
    d2_hooks.PeriodicWriter,
)
"""What must precede and follow IMWAHook in a trainer's list of hooks."""


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


def check_length(trainer: TrainerBase, schedule: EpisodeSchedule) -> None:
    """Raise ValueError if a trainer is not set to M * T steps, or its learning rates not to T."""
    if trainer.max_iter != len(schedule):
        common = f", {schedule.start} of them in common," if schedule.start else ""
        raise ValueError(
            f"the trainer is set to {trainer.max_iter} steps, but {schedule.members} members of "
            f"{schedule.iterations} iterations{common} are {len(schedule)} (use IMWAHook.register, "
            "or pass that number to train)"
        )
    check_rates(trainer, schedule)


def check_place(trainer: TrainerBase, imwa: HookBase) -> None:
    """Raise ValueError if IMWAHook is at a wrong place in the list of hooks."""
    hooks = list(trainer._hooks)
    place = next(i for i, hook in enumerate(hooks) if hook is imwa)
    early = [type(hook).__name__ for hook in hooks[:place] if isinstance(hook, AFTER)]
    late = [type(hook).__name__ for hook in hooks[place:] if isinstance(hook, BEFORE)]
    if early or late:
        rules = [f"{name} must follow it" for name in early]
        rules += [f"{name} must precede it" for name in late]
        raise ValueError(
            f"IMWAHook is at the wrong place in the list of hooks: {', '.join(rules)} (use "
            "IMWAHook.register)"
        )


def check_checkpointers(trainer: TrainerBase, averages: Mapping[str, Average]) -> None:
    """Raise ValueError if no checkpointer of the trainer saves what a resume needs.

    Args:
        trainer: its own `checkpointer` and its hooks' are looked at; it may have none.
        averages: what it averages beside its model, by the expression that a project has for it.
    """
    owners = (trainer, *trainer._hooks)
    found = [getattr(x, name, None) for x in owners for name in ("checkpointer", "_checkpointer")]
    checkpointers = [checkpointer for checkpointer in found if checkpointer is not None]
    # By the list of hooks: DefaultTrainer's checkpointer holds a proxy of the trainer.
    complete = [
        checkpointer
        for checkpointer in checkpointers
        if any(
            getattr(x, "_hooks", None) is trainer._hooks
            for x in checkpointer.checkpointables.values()
        )
    ]
    if checkpointers and not complete:
        raise ValueError(
            "no checkpointer of the trainer saves the trainer, so that a run could not be resumed; "
            'before IMWAHook.register: checkpointer.add_checkpointable("trainer", trainer)'
        )
    for name, average in averages.items():
        if complete and not any(_saves(checkpointer, average) for checkpointer in complete):
            key = name.rpartition(".")[2]
            raise ValueError(
                f"no checkpointer of the trainer saves {name}, so that a run could not be resumed; "
                f'before IMWAHook.register: checkpointer.add_checkpointable("{key}", {name})'
            )


def _saves(checkpointer: Any, average: Average) -> bool:
    if isinstance(average, nn.Module):
        average = unwrapped(average)
    held = (checkpointer.model, *checkpointer.checkpointables.values())
    return any(
        part is average
        for x in held
        for part in (unwrapped(x).modules() if isinstance(x, nn.Module) else (x,))
    )


def share_handlers() -> None:
    """Let this package's log lines reach the handlers of detectron2's logger, such as log.txt."""
    ours, theirs = logging.getLogger("ssod_imwa"), logging.getLogger("detectron2")
    for handler in theirs.handlers:
        if handler not in (*ours.handlers, *logging.getLogger().handlers):
            ours.addHandler(handler)
    if theirs.handlers and ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
