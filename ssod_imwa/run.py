"""Assembles and runs what a configuration describes: training with IMWA, or an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.config import get_cfg
from ssod_imwa.config.reader import keys
from ssod_imwa.data.catalog import fingerprint
from ssod_imwa.data.validation import check_readable
from ssod_imwa.detection import build
from ssod_imwa.engine import comm
from ssod_imwa.engine.atomic import write_text
from ssod_imwa.engine.checkpoint import CheckpointHook, prepare_output, resume
from ssod_imwa.engine.hooks import EvaluationHook, Evaluations, IMWAHook, LRHook, SignalHook
from ssod_imwa.engine.launch import distribute
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.engine.solver import build_optimizer, gradient_clipper, lr_multiplier
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.engine.writers import (
    JSONWriter,
    MetricsHook,
    TensorBoardWriter,
    TerminalWriter,
    peak_memory,
)
from ssod_imwa.errors import UserError
from ssod_imwa.results import FILE_NAME, Evaluation, Results, write_results
from ssod_imwa.trained import newest_model

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
# Keys that change neither weights nor data order: a resumed run may change them.
FREE_KEYS = (
    "OUTPUT_DIR",
    "LOG_PERIOD",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DATASETS.ROOT",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.CHECKPOINT_KEEP",
    "TEST.EVAL_PERIOD",
    "TEST.EVAL_MEMBERS",
    "TEST.IMS_PER_BATCH",
)


def train(
    cfg: CfgNode,
    *,
    resume_from: bool | str | Path = False,
    overwrite: bool = False,
    allow_inexact: bool = False,
) -> int:
    """Train, evaluate and write everything to OUTPUT_DIR.

    Args:
        cfg: see `config.load_config`.
        resume_from: True continues from the newest intact checkpoint in OUTPUT_DIR, a path from
            that file.
        overwrite: replace the run that OUTPUT_DIR holds.
        allow_inexact: resume although settings changed.

    Returns:
        0, or 128 + the signal that ended the run early.

    Raises:
        UserError: something in the configuration, the data or OUTPUT_DIR is wrong.
    """
    device = pick_device(cfg.MODEL.DEVICE)
    data = build.build_data(cfg)
    for test in data.tests:
        check_readable(test)  # else found when the first episode is over
    cfg = build.with_classes(cfg, data.labelled.classes)
    lock = prepare_output(cfg.OUTPUT_DIR, resume=bool(resume_from), overwrite=overwrite)
    try:
        trainer, signals = _assemble(cfg, data, device, overwrite=overwrite)
        if resume_from:
            source = cfg.OUTPUT_DIR if resume_from is True else resume_from
            resume(trainer, source, _identity(cfg, data), allow_inexact=allow_inexact)
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(cfg, error)) from error
    finally:
        if lock is not None:
            lock.release()
    return signals.exit_code


def evaluate(cfg: CfgNode, weights: str | Path | None = None) -> dict[str, float]:
    """Metrics in percent of a finished run's model, or of any weights file, on DATASETS.TEST.

    Args:
        cfg: as for training.
        weights: a file as MODEL.WEIGHTS takes it; None takes OUTPUT_DIR's final or newest averaged
            model.
    """
    if weights is None:
        weights = newest_model(cfg.OUTPUT_DIR)
    data = build.build_data(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)
    detector = build.build_detector(cfg, len(data.labelled.classes))
    logger.info("evaluating %s", weights)
    return build.build_evaluator(cfg, data.tests)(detector.to(pick_device(cfg.MODEL.DEVICE)))


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
        written = CfgNode(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = {key: _value(cfg, key) for cfg in (get_cfg(), written) for key in keys(cfg)}
    return {key: value for key, value in found.items() if not _is_said_elsewhere(key)}


def _is_said_elsewhere(key: str) -> bool:
    """Whether a key is in results.json or does not change the figures."""
    free = key in FREE_KEYS and key != "MODEL.WEIGHTS"
    return free or key in ("SEED", "DATASETS.SPLIT.FOLD") or key.startswith("IMWA.")


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def pick_device(name: str) -> torch.device:
    """The device of MODEL.DEVICE; "auto" is the current GPU if there is one.

    Raises:
        UserError: it names a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"MODEL.DEVICE = {name!r} is not allowed (must be auto, cpu, cuda or cuda:N)"
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE = {name!r}: no GPU is found (use auto or cpu)")
    return device


def _assemble(
    cfg: CfgNode, data: build.DetectionData, device: torch.device, *, overwrite: bool
) -> tuple[Trainer, SignalHook]:
    schedule = EpisodeSchedule(
        cfg.SOLVER.MAX_ITER, episodes=cfg.IMWA.EPISODES, members=cfg.IMWA.MEMBERS
    )
    # All members of all runs with this seed start from the same weights.
    seed_everything(cfg.SEED, "initial weights")
    detector = build.build_detector(cfg, len(data.labelled.classes)).to(device)
    algorithm = build.build_algorithm(cfg, detector)
    distribute(algorithm)
    solver = cfg.SOLVER
    optimizer = build_optimizer(
        algorithm.student,
        name=solver.OPTIMIZER,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
    )
    batches = build.build_batches(cfg, data, schedule)
    clip = solver.CLIP_GRADIENTS
    trainer = Trainer(
        algorithm,
        schedule,
        batches,
        optimizer,
        seed=cfg.SEED,
        first_member=cfg.IMWA.FIRST_MEMBER,
        accumulation=solver.ACCUMULATION_STEPS,
        amp_dtype=getattr(torch, solver.AMP.DTYPE) if solver.AMP.ENABLED else None,
        clip=gradient_clipper(clip.CLIP_TYPE, clip.CLIP_VALUE) if clip.ENABLED else None,
    )
    imwa = _build_imwa(cfg, trainer, batches)
    hooks = _build_hooks(cfg, data, schedule, imwa, overwrite=overwrite)
    trainer.register_hooks(hooks)
    return trainer, hooks[-1]


def _build_imwa(cfg: CfgNode, trainer: Trainer, batches: build.Batches) -> IMWA:
    settings = cfg.IMWA
    recompute = None
    if settings.BN == "recompute":
        recompute = build.build_bn_recomputation(
            batches,
            strong_labeled=cfg.SSOD.STRONG_LABELED,
            count=min(settings.BN_BATCHES, len(trainer.schedule)),
        )
    return IMWA(
        trainer.schedule,
        trainer.algorithm.models(),
        optimizer=trainer.optimizer,
        member_state={"scaler": trainer.scaler, "algorithm": trainer.algorithm},
        store=settings.STORE,
        store_device=settings.STORE_DEVICE,
        optimizer_state=settings.OPTIMIZER_STATE,
        bn=settings.BN,
        recompute_bn=recompute,
        nonfinite=settings.NONFINITE,
        accumulate=settings.ACCUMULATE,
        coefficients=settings.COEFFICIENTS or None,
    )


def _build_hooks(
    cfg: CfgNode,
    data: build.DetectionData,
    schedule: EpisodeSchedule,
    imwa: IMWA,
    *,
    overwrite: bool,
) -> list[HookBase]:
    """In the order of docs/architecture.md; the last one is the signal hook."""
    output, solver = Path(cfg.OUTPUT_DIR), cfg.SOLVER
    writers = [
        JSONWriter(output / "metrics.json"),
        TensorBoardWriter(output),
        TerminalWriter(schedule),
    ]
    checkpoint = CheckpointHook(
        output,
        run=_identity(cfg, data),
        period=solver.CHECKPOINT_PERIOD,
        keep=solver.CHECKPOINT_KEEP,
        overwrite=overwrite,
    )
    signals = SignalHook(checkpoint.save_now)
    multiplier = lr_multiplier(
        solver.LR_SCHEDULER_NAME,
        max_iter=solver.MAX_ITER,
        steps=solver.STEPS,
        gamma=solver.GAMMA,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
    )
    evaluations = Evaluations()
    members = EvaluationHook(
        "member evaluation",
        build.build_evaluator(cfg, data.tests),
        evaluations,
        stage="member",
        period=cfg.TEST.EVAL_PERIOD,
        writers=writers,
    )
    averages = EvaluationHook(
        "evaluation",
        build.build_evaluator(cfg, data.tests, poll=signals.poll),
        evaluations,
        stage="average",
        period=cfg.TEST.EVAL_PERIOD,
        writers=writers,
    )
    return [
        LRHook(multiplier),
        *([members] if cfg.TEST.EVAL_MEMBERS else []),
        IMWAHook(imwa),
        MetricsHook(writers, cfg.LOG_PERIOD),
        checkpoint,
        averages,
        ConfigHook(output / CONFIG_FILE, cfg),
        ResultsHook(output / FILE_NAME, cfg, data, evaluations, checkpoint),
        signals,
    ]


class ConfigHook(HookBase):
    """Writes config.yaml once a step is done: an overwritten run keeps its own until then."""

    def __init__(self, path: Path, cfg: CfgNode) -> None:
        self._path = path
        self._text = cfg.dump()

    @property
    def name(self) -> str:
        return "config"

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter and comm.is_main():
            write_text(self._path, self._text, kind="config")


class ResultsHook(HookBase):
    """Writes results.json whenever there is a new evaluation, and at the end."""

    def __init__(
        self,
        path: Path,
        cfg: CfgNode,
        data: build.DetectionData,
        evaluations: Evaluations,
        checkpoint: CheckpointHook,
    ) -> None:
        self._path = path
        self._describe = _describe(cfg, data)
        self._evaluations = evaluations
        self._checkpoint = checkpoint
        self._written = -1

    @property
    def name(self) -> str:
        return "results"

    def after_step(self) -> None:
        count = len(self._evaluations.records)
        is_last = self.trainer.iter + 1 == self.trainer.max_iter
        if (count != self._written or is_last) and comm.is_main():
            self._write()
            self._written = count

    def after_train(self) -> None:
        # Resuming at the very end makes up for an evaluation without doing a step.
        if self.trainer.start_iter == self.trainer.max_iter and comm.is_main():
            self._write()

    def _write(self) -> None:
        results = self._describe(
            wall_time=self._checkpoint.state_dict()["seconds"],
            peak_memory=peak_memory(),
            evaluations=tuple(Evaluation(**record) for record in self._evaluations.records),
        )
        write_results(self._path, results)


def _describe(cfg: CfgNode, data: build.DetectionData) -> Callable[..., Results]:
    split = cfg.DATASETS.SPLIT
    share = f" {split.PERCENT:g} %" if split.PERCENT < 100 else ""
    unlabelled = "".join(f" + {name}" for name in cfg.DATASETS.TRAIN_UNLABELED)
    trained = "+".join(cfg.DATASETS.TRAIN) + share + unlabelled
    imwa = {key.lower(): value for key, value in cfg.IMWA.items()}

    def describe(*, wall_time: float, peak_memory: int, evaluations: Any) -> Results:
        return Results(
            task="detection",
            dataset=f"{trained}, tested on {', '.join(test.name for test in data.tests)}",
            method=cfg.SSOD.ALGORITHM,
            imwa=imwa,
            seed=cfg.SEED,
            fold=split.FOLD if split.PERCENT < 100 else None,
            iterations=cfg.SOLVER.MAX_ITER,
            wall_time=wall_time,
            peak_memory=peak_memory,
            evaluations=evaluations,
        )

    return describe


def _identity(cfg: CfgNode, data: build.DetectionData) -> dict[str, Any]:
    """What has to be the same for an exact resume, and the config for the reader."""
    run: dict[str, Any] = {}
    for key in keys(cfg):
        if key not in FREE_KEYS:
            run[key] = _value(cfg, key)
    run["labelled images"] = fingerprint(data.labelled)
    run["unlabelled images"] = None if data.unlabelled is None else fingerprint(data.unlabelled)
    run["processes"] = comm.world_size()
    run["config"] = cfg.dump()
    return run


def _out_of_memory(cfg: CfgNode, error: Exception) -> str:
    imwa = cfg.IMWA
    images = cfg.SOLVER.IMS_PER_BATCH + cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    first = str(error).splitlines()[0]
    return (
        f"out of memory with IMWA.MEMBERS = {imwa.MEMBERS}, IMWA.STORE = {imwa.STORE}, "
        f"IMWA.STORE_DEVICE = {imwa.STORE_DEVICE} and {images} images an iteration ({first}); "
        "raise SOLVER.ACCUMULATION_STEPS, or set IMWA.STORE_DEVICE cpu"
    )
