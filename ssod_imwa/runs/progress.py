"""What a run says of itself: at its start, in its evaluations, and how long it will take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.config.shared import batch_sizes
from ssod_imwa.engine.checkpoint.output import resume_files
from ssod_imwa.engine.evaluation import EvaluationHook
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.terminal import EvaluationProgress
from ssod_imwa.engine.time_left import TimeLeft
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import MetricsHook
from ssod_imwa.errors import one_line
from ssod_imwa.runs.schedule import build_schedule
from ssod_imwa.task import Batches, Evaluator, Task

logger = logging.getLogger(__name__)

_SHOWN = 10  # names of classes


def log_summary(task: Task, device: torch.device) -> None:
    """Log what is trained on what, for how long and where to, before it begins."""
    for line in summary_lines(task, device):
        logger.info("%s", line)


def summary_lines(task: Task, device: torch.device) -> list[str]:
    """A heading and the contents of a run, a line each, beginning with what it says."""
    cfg = task.cfg
    names = [one_line(name) for name in task.classes[:_SHOWN]]
    more = ", ..." if len(task.classes) > _SHOWN else ""
    batch = " + ".join(map(str, batch_sizes(cfg).values()))
    schedule = _schedule_in_words(build_schedule(cfg, task.ranks))
    on = f" on {_counted(task.ranks.run.size, 'process')}" if task.ranks.run.size > 1 else ""
    return [
        f"{task.name}: {task.method} on {one_line(task.dataset)}",
        "images: " + ", ".join(f"{count} {kind}" for kind, count in task.images.items()),
        f"classes: {len(task.classes)} ({', '.join(names)}{more})",
        f"device: {_device_name(device)}{on}",
        f"schedule: {schedule}; {batch} images an iteration",
        f"output folder: {cfg.OUTPUT_DIR}",
    ]


def _schedule_in_words(schedule: EpisodeSchedule) -> str:
    words = _counted(schedule.iterations, "iteration")
    if schedule.members > 1:
        how = "at once" if schedule.only is not None else f"{len(schedule)} global steps in all"
        words += f" of each of {schedule.members} members, {how},"
    if schedule.start:
        words = f"{words.rstrip(',')}, the first {schedule.start} in common, then"
    return f"{words} in {_counted(schedule.episodes - schedule.parting, 'episode')}"


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_counted(torch.get_num_threads(), 'thread')})"


def build_time_left(
    task: Task, method: Method, batches: Batches, schedule: EpisodeSchedule
) -> TimeLeft:
    """What estimates the rest of the run, which knows of no evaluations yet."""
    phases = {
        start: float(sum(passes * batches.sizes[stream] for stream, passes in streams.items()))
        for start, streams in method.phases().items()
        if start < schedule.iterations
    }
    return TimeLeft(schedule, phases, evaluation_work=float(task.images["tested"]))


def expect_evaluations(time_left: TimeLeft, hooks: Sequence[HookBase]) -> None:
    """Count on the evaluations of a trainer's hooks, which are in order and registered."""
    rows = next(i for i, hook in enumerate(hooks) if isinstance(hook, MetricsHook))
    for i, hook in enumerate(hooks):
        if not isinstance(hook, EvaluationHook):
            continue
        trainer = hook.trainer
        models = {
            g: len(trainer.method.evaluated_models(trainer.schedule.position(g).t))
            for g in hook.due_steps()
        }
        steps = (g for g, count in models.items() for _ in range(count))
        time_left.expect(steps, after_row=i > rows)


def watched(
    task: Task,
    progress: EvaluationProgress,
    time_left: TimeLeft,
    processes: Group,
    poll: Callable[[], object] | None = None,
) -> Evaluator:
    """The task's evaluator, which shows how far it is and tells how long it took.

    Args:
        task: of the run.
        progress: shows it, on the first rank.
        time_left: learns how long an evaluation takes.
        processes: see `Task.build_evaluator`.
        poll: called after each batch, equally often on all ranks.
    """
    # Groups that share the test images alike have equally many batches of them.
    shows = task.ranks.run.is_main

    def after_batch(done: int, total: int) -> None:
        if shows:
            progress(done, total)
        if poll is not None:
            poll()

    evaluate = task.build_evaluator(processes, poll=after_batch)

    def evaluate_model(model: nn.Module) -> dict[str, float]:
        if not shows:
            with time_left.evaluation():
                return evaluate(model)
        with time_left.evaluation(), progress.shown():
            return evaluate(model)

    return evaluate_model


def stopped_line(outputs: Sequence[str | Path], command: str) -> str:
    """What was saved of a run that a signal ended, and how it goes on.

    Args:
        outputs: OUTPUT_DIR of each generation, in turn; the last that has begun holds the
            checkpoint, if there is one.
        command: goes on with it.
    """
    found = [item for output in reversed(outputs) for item in resume_files(output).items()]
    done, path = next(iter(found), (None, None))
    if done is None:  # of a member that will be dropped none is written
        return one_line(f"{outputs[-1]} holds no checkpoint yet: the run has to begin anew")
    return one_line(f"{path} is the checkpoint of global step {done + 1}; go on with: {command}")
