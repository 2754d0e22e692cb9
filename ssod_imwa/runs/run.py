"""Assembles and runs what a configuration describes: training with IMWA, or an evaluation."""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.config.averaging import members_at_once
from ssod_imwa.config.reader import keys, value_of
from ssod_imwa.config.shared import batch_sizes
from ssod_imwa.config.yaml_text import parse_yaml
from ssod_imwa.engine.checkpoint.models import check_classes, newest_model
from ssod_imwa.engine.checkpoint.output import on_main, refuse_used, removed
from ssod_imwa.engine.checkpoint.writing import CheckpointHook, prepare_output, resume
from ssod_imwa.engine.device import pick_device, warn_if_slower_than_float32
from ssod_imwa.engine.evaluation import Evaluations
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.launch import distribute
from ssod_imwa.engine.memory import keep_freed_memory
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.engine.signals import SignalHook, StopSignals
from ssod_imwa.engine.solver import gradient_clipper
from ssod_imwa.engine.terminal import EvaluationProgress, TerminalWriter
from ssod_imwa.engine.time_left import TimeLeft
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.engine.writers import (
    JSONWriter,
    MetricsHook,
    TensorBoardWriter,
)
from ssod_imwa.errors import CheckpointError, ConfigError, UserError
from ssod_imwa.runs.advice_hooks import build_advice
from ssod_imwa.runs.config import FREE_KEYS, defaults_of
from ssod_imwa.runs.cross_teaching import build_cross_teaching
from ssod_imwa.runs.evaluations import build_evaluations
from ssod_imwa.runs.generations import all_generations, train_all
from ssod_imwa.runs.hooks import ConfigHook, ResultsHook
from ssod_imwa.runs.imwa import build_imwa, build_lawa
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.progress import build_time_left, expect_evaluations, log_summary, watched
from ssod_imwa.runs.results import FILE_NAME
from ssod_imwa.runs.schedule import build_schedule
from ssod_imwa.runs.solver import build_lr_hook, build_task_optimizer
from ssod_imwa.task import Batches, Task

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(
    cfg: CfgNode,
    ranks: Ranks = Ranks.alone(),
    *,
    resume_from: bool | str | Path = False,
    overwrite: bool = False,
    allow_inexact: bool = False,
) -> int:
    """Train, evaluate and write everything to OUTPUT_DIR.

    Args:
        cfg: see `runs.config.load_config`.
        ranks: what `launch` hands its processes.
        resume_from: True continues from the newest intact checkpoint in OUTPUT_DIR, a path from
            that file.
        overwrite: replace the run that OUTPUT_DIR holds.
        allow_inexact: resume although settings changed.

    Returns:
        0, or 128 + the signal that ended training early.

    Raises:
        UserError: something in the configuration, the data or OUTPUT_DIR is wrong, or training
            diverged.
        SystemExit: a signal came before training.
    """
    if ranks.members != members_at_once(cfg):
        raise ConfigError(
            f"IMWA.PARALLEL = {cfg.IMWA.PARALLEL} with IMWA.MEMBERS = {cfg.IMWA.MEMBERS} is not "
            f"allowed on ranks that train {ranks.members} at once (start the run by launch(..., "
            "members=members_at_once(cfg)))"
        )
    generations = all_generations(cfg)
    if len(generations) > 1 and isinstance(resume_from, str | Path):
        raise CheckpointError(
            f"{resume_from} is of one of {len(generations)} generations: continue with --resume"
        )
    if not resume_from and not overwrite:  # before the first one, not when the last one's turn is
        for own in generations:
            on_main(partial(refuse_used, Path(own.OUTPUT_DIR)), ranks.run)
    settings = {"overwrite": overwrite, "allow_inexact": allow_inexact}
    train_one = partial(_train_one, ranks, resume_from, **settings)
    return train_all(generations, ranks, train_one, resumes=bool(resume_from))


def _train_one(
    ranks: Ranks,
    resume_from: bool | str | Path,
    cfg: CfgNode,
    *,
    overwrite: bool,
    allow_inexact: bool,
) -> int:
    """Train what one OUTPUT_DIR holds."""
    device = pick_device(cfg.MODEL.DEVICE)
    if device.type == "cpu":
        keep_freed_memory()
    with StopSignals() as signals:
        task = open_task(cfg, ranks)
        cfg = task.cfg
        log_summary(task, device)
        lock = prepare_output(
            cfg.OUTPUT_DIR, resume=bool(resume_from), overwrite=overwrite, run=ranks.run
        )
        try:
            if lock is not None:
                signals.abandon = lock.abandon
            trainer, hook = _assemble(task, device, signals, overwrite=overwrite)
            if resume_from:
                source = cfg.OUTPUT_DIR if resume_from is True else resume_from
                found = resume(trainer, source, _identity(task), allow_inexact=allow_inexact)
                if found is None and resume_from is not True:
                    raise CheckpointError(f"no checkpoint in {source} (nothing to resume from)")
                if found is None:
                    logger.info("no checkpoint in %s: training starts from its beginning", source)
            _train(trainer, cfg)
        finally:
            if lock is not None:
                lock.release()
    return hook.exit_code


def _train(trainer: Trainer, cfg: CfgNode) -> None:
    """Train; what a user can mend is a UserError."""
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(cfg, error)) from error
    except OSError as error:
        output = Path(cfg.OUTPUT_DIR)
        if not output.is_dir():
            raise CheckpointError(removed(output)) from error
        if error.errno not in _DISK_IS_FULL and not _is_in(error.filename, output):
            raise
        where = os.fsdecode(error.filename or output)
        raise CheckpointError(f"{where} cannot be written: {error.strerror}") from error


def _is_in(name: str | bytes | None, folder: Path) -> bool:
    """Whether a file name of an OSError, which may have none, is of a file in a folder."""
    return name is not None and folder.resolve() in Path(os.fsdecode(name)).resolve().parents


def evaluate(
    cfg: CfgNode, weights: str | Path | None = None, *, ranks: Ranks = Ranks.alone()
) -> dict[str, float]:
    """Metrics in percent of a finished run's model, or of any weights file, on DATASETS.TEST.

    Args:
        cfg: as for training.
        weights: a file as MODEL.WEIGHTS takes it; None takes OUTPUT_DIR's final or newest averaged
            model.
        ranks: what `launch` hands its processes.

    Raises:
        UserError: as for training, or the model was trained on other classes.
    """
    if weights is None:
        weights = newest_model(cfg.OUTPUT_DIR)
    device = pick_device(cfg.MODEL.DEVICE)
    task = open_task(cfg, ranks)
    model = task.load_model(str(weights))
    check_classes(weights, task.classes)
    logger.info("evaluating %s", weights)
    progress = EvaluationProgress()
    if not ranks.run.is_main:
        return task.build_evaluator()(model.to(device).eval())
    with progress.shown():
        return task.build_evaluator(poll=progress)(model.to(device).eval())


def read_settings(run_dir: str | Path) -> dict[str, Any] | None:
    """What a finished run's figures depend on besides its seed, its fold and what results.json has.

    Returns:
        Values by key, defaults included, as in the run's config.yaml; None if there is none.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        # Not `load_config`, which refuses the keys of other versions.
        written = CfgNode(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    trees = (defaults_of(written), written)
    settings = {key: value_of(tree, key) for tree in trees for key in keys(tree)}
    return {key: value for key, value in settings.items() if not _is_said_elsewhere(key)}


def _is_said_elsewhere(key: str) -> bool:
    """Whether a key is in results.json or does not change the figures."""
    free = key in FREE_KEYS and key != "MODEL.WEIGHTS"
    return free or key in ("SEED", "DATASETS.SPLIT.FOLD") or key.startswith("IMWA.")


def _assemble(
    task: Task, device: torch.device, signals: StopSignals, *, overwrite: bool
) -> tuple[Trainer, SignalHook]:
    cfg = task.cfg
    schedule = build_schedule(cfg, task.ranks)
    # All members of all runs with this seed start from the same weights.
    seed_everything(cfg.SEED, "initial weights", *task.initialization)
    method = task.build_method(device)
    distribute(method, task.ranks)
    solver = cfg.SOLVER
    batches = task.build_batches(schedule, device, method.reads)
    clip = solver.CLIP_GRADIENTS
    amp_dtype = getattr(torch, solver.AMP.DTYPE) if solver.AMP.ENABLED else None
    if task.ranks.run.is_main:
        warn_if_slower_than_float32(device, amp_dtype)
    trainer = Trainer(
        method,
        schedule,
        batches,
        build_task_optimizer(task, method.student),
        seed=cfg.SEED,
        first_member=cfg.IMWA.FIRST_MEMBER,
        accumulation=solver.ACCUMULATION_STEPS,
        amp_dtype=amp_dtype,
        clip=gradient_clipper(clip.CLIP_TYPE, clip.CLIP_VALUE) if clip.ENABLED else None,
        drops_members=cfg.IMWA.NONFINITE == "drop",
        ranks=task.ranks,
    )
    imwa = build_imwa(task, trainer, batches)
    time_left = build_time_left(task, method, batches, schedule)
    hooks, signal_hook = _build_hooks(
        task, trainer, imwa, batches, signals, time_left, overwrite=overwrite
    )
    trainer.register_hooks([build_lr_hook(task, method), *hooks, signal_hook])
    expect_evaluations(time_left, hooks)
    return trainer, signal_hook


def _build_hooks(
    task: Task,
    trainer: Trainer,
    imwa: IMWA | ParallelIMWA,
    batches: Batches,
    signals: StopSignals,
    time_left: TimeLeft,
    *,
    overwrite: bool,
) -> tuple[list[HookBase], SignalHook]:
    """In the order of docs/architecture.md after LRHook; and that of signals, which is the last."""
    cfg = task.cfg
    output, solver = Path(cfg.OUTPUT_DIR), cfg.SOLVER
    progress = EvaluationProgress()
    writers = [
        JSONWriter(output / "metrics.json"),
        TensorBoardWriter(output, by_member=task.ranks.members > 1),
        TerminalWriter(trainer.schedule, evaluation=progress),
    ]
    lawa = build_lawa(task, trainer, batches)
    checkpoint = CheckpointHook(
        output,
        run=_identity(task),
        period=solver.CHECKPOINT_PERIOD,
        episodes=solver.CHECKPOINT_EPISODES,
        keep=solver.CHECKPOINT_KEEP,
        overwrite=overwrite,
        leftovers=task.leftovers(),
        lawa=None if lawa is None else lawa.weights,
    )
    signal_hook = SignalHook(signals, checkpoint.save_now)
    evaluations = Evaluations()
    advice = build_advice(task, trainer, batches, evaluations)
    watch = partial(watched, task, progress, time_left)
    evaluating = build_evaluations(
        task, evaluations, watch, signal_hook.poll, writers, replaces=imwa.replaces, lawa=lawa
    )
    hooks = [
        *([evaluating.running] if cfg.TEST.EVAL_PERIOD else []),
        *([evaluating.members] if cfg.TEST.EVAL_MEMBERS else []),
        *task.hooks(),
        *advice.before_average,
        *build_cross_teaching(task, trainer.method),
        IMWAHook(imwa),
        *advice.after_average,
        *([] if lawa is None else [lawa]),
        MetricsHook(writers, cfg.LOG_PERIOD, time_left),
        checkpoint,
        evaluating.averages,
        *([] if evaluating.lawa is None else [evaluating.lawa]),
        *advice.after_evaluation,
        ConfigHook(output / CONFIG_FILE, cfg),
        ResultsHook(output / FILE_NAME, task, evaluations, checkpoint),
    ]
    return hooks, signal_hook


def _identity(task: Task) -> dict[str, Any]:
    """What has to be the same for an exact resume, and what is for the reader."""
    cfg = task.cfg
    run: dict[str, Any] = {}
    for key in keys(cfg):
        if key not in FREE_KEYS:
            run[key] = value_of(cfg, key)
    run |= task.fingerprints()
    run["processes"] = task.ranks.run.size
    run["classes"] = list(task.classes)
    run["stored_size"] = task.stored_size
    run["config"] = cfg.dump()
    return run


def _out_of_memory(cfg: CfgNode, error: Exception) -> str:
    imwa = cfg.IMWA
    images = sum(batch_sizes(cfg).values())
    first = str(error).splitlines()[0]
    if imwa.PARALLEL:
        store, fix = "IMWA.PARALLEL = True", "take more processes"
    else:
        store = f"IMWA.STORE = {imwa.STORE}, IMWA.STORE_DEVICE = {imwa.STORE_DEVICE}"
        fix = "set IMWA.STORE_DEVICE cpu"
    return (
        f"out of memory with IMWA.MEMBERS = {imwa.MEMBERS}, {store} and {images} images an "
        f"iteration ({first}); raise SOLVER.ACCUMULATION_STEPS, or {fix}"
    )
