"""From a configuration to what averages the members of its run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.averaging.exchange import average_over_ranks
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.outer import TO_THE_MEAN, Outer
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.watched import floating_buffers
from ssod_imwa.averaging.weights import copy_, named_state
from ssod_imwa.config.averaging import OuterOptions, StoreOptions, common_iterations
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.lawa import LawaHook
from ssod_imwa.engine.trainer import Trainer
from ssod_imwa.runs.schedule import build_schedule
from ssod_imwa.task import Batches, Recompute, Task

logger = logging.getLogger(__name__)


def build_imwa(task: Task, trainer: Trainer, batches: Batches) -> IMWA | ParallelIMWA:
    """IMWA of members in turn, or at once if the ranks say so.

    Args:
        task: of the run.
        trainer: whose models and optimizer are the members'.
        batches: what the trainer reads.
    """
    settings, schedule = task.cfg.IMWA, trainer.schedule
    coefficients = task.coefficients(trainer.method)
    common = {
        "optimizer": trainer.optimizer,
        "member_state": {"scaler": trainer.scaler, "method": trainer.method},
        "optimizer_state": settings.OPTIMIZER_STATE,
        "bn": settings.BN,
        "recompute_bn": _build_recomputation(task, trainer, batches),
        "nonfinite": settings.NONFINITE,
        "accumulate": settings.ACCUMULATE,
        # Members that never part have no average to weigh them in.
        "coefficients": coefficients if schedule.members > 1 else None,
        "outer": _outer(task.cfg),
        "ranks": task.ranks,
    }
    if task.ranks.members > 1:
        return ParallelIMWA(schedule, trainer.method.models(), **common)
    store = read_options(StoreOptions, settings)
    return IMWA(
        schedule,
        trainer.method.models(),
        store=store.store,
        store_device=store.store_device,
        **common,
    )


def build_lawa(task: Task, trainer: Trainer, batches: Batches) -> LawaHook | None:
    """What averages the last averages of a run; None if IMWA.LAWA is 0."""
    settings, episodes = task.cfg.IMWA, trainer.schedule.episodes
    if settings.LAWA == 0:
        return None
    if episodes < settings.LAWA:
        logger.info(
            "IMWA.LAWA = %d: the run has %d episodes, so all of them are averaged",
            settings.LAWA,
            episodes,
        )
    recompute = _build_recomputation(task, trainer, batches)
    return LawaHook(settings.LAWA, accumulate=settings.ACCUMULATE, recompute=recompute)


def _outer(cfg: CfgNode) -> Outer:
    iterations = cfg.SOLVER.MAX_ITER
    if common_iterations(cfg.IMWA.START, iterations) == iterations:  # the plain run
        return TO_THE_MEAN
    options = read_options(OuterOptions, cfg.IMWA.OUTER)
    return Outer(lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)


def _build_recomputation(task: Task, trainer: Trainer, batches: Batches) -> Recompute | None:
    if task.cfg.IMWA.BN != "recompute":
        return None
    steps = len(build_schedule(task.cfg))
    return build_recomputation(
        task, batches_in_turn(task, trainer, batches), count=min(task.cfg.IMWA.BN_BATCHES, steps)
    )


def build_recomputation(task: Task, batches: Batches, *, count: int) -> Recompute:
    """What re-estimates batch norms, to the same on all ranks: the mean of those sharing a batch.

    Args:
        task: of the run.
        batches: of this rank.
        count: of iterations whose batches are read.
    """
    recompute = task.build_bn_recomputation(batches, count=count)
    ranks = task.ranks

    def recompute_for_all(modules: Mapping[str, nn.Module]) -> None:
        recompute(modules)
        if ranks.batch.size > 1:
            buffers = floating_buffers(modules, named_state(modules))
            copy_(buffers, average_over_ranks(buffers, ranks.batch, run=ranks.run))

    return recompute_for_all


def batches_in_turn(task: Task, trainer: Trainer, batches: Batches) -> Batches:
    """Those of a run whose members take turns: the same ones for all, also for members at once."""
    if task.ranks.members == 1:
        return batches
    return task.build_batches(build_schedule(task.cfg), trainer.device, trainer.method.reads)
