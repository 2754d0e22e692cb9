"""Runs of several generations: each trains a new network on labels of the one before (CReST)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.classification.data.splits import labeled_among
from ssod_imwa.classification.generations import (
    LABELS_FILE,
    GenerationOptions,
    choose_labels,
    keep_rates,
    write_labels,
)
from ssod_imwa.classification.prediction import predict_readable
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.checkpoint.models import newest_model
from ssod_imwa.engine.checkpoint.output import on_main
from ssod_imwa.errors import ConfigError

logger = logging.getLogger(__name__)


def generation_count(cfg: CfgNode) -> int:
    """How many runs a configuration stands for; 1 but for CReST."""
    options = _options(cfg)
    return 1 if options.generation > 0 else options.generations


def all_generations(cfg: CfgNode) -> list[CfgNode]:
    """The configurations of the runs that a configuration stands for, in turn; itself if it is one.

    The last one writes to OUTPUT_DIR itself, the others to generation1, generation2, ... in it.

    Raises:
        ConfigError: iterations or episodes cannot be divided among generations.
    """
    count = generation_count(cfg)
    if count == 1:
        return [cfg]
    _check_divisible(cfg, count)
    return [_one(cfg, number, count) for number in range(1, count + 1)]


def _options(cfg: CfgNode) -> GenerationOptions:
    node = cfg.get("CLS")
    return read_options(GenerationOptions, node.get("CREST") if node is not None else None)


def _check_divisible(cfg: CfgNode, generations: int) -> None:
    episodes, members = cfg.IMWA.EPISODES, cfg.IMWA.MEMBERS
    if episodes % generations and (members > 1 or episodes > 1):
        raise ConfigError(
            f"IMWA.EPISODES = {episodes} is not allowed with CLS.CREST.GENERATIONS = {generations} "
            "(must be a multiple: a generation begins with new weights, across which no average "
            "means anything)"
        )
    if cfg.SOLVER.MAX_ITER % generations or cfg.CLS.SCHEDULE.EPOCHS:
        raise ConfigError(
            f"SOLVER.MAX_ITER = {cfg.SOLVER.MAX_ITER} with CLS.SCHEDULE.EPOCHS = "
            f"{cfg.CLS.SCHEDULE.EPOCHS:g} is not allowed with CLS.CREST.GENERATIONS = "
            f"{generations} (must be a multiple, and EPOCHS 0)"
        )


def _one(cfg: CfgNode, number: int, generations: int) -> CfgNode:
    output = Path(cfg.OUTPUT_DIR)
    folders = [output / f"generation{g}" for g in range(1, generations)] + [output]
    own = cfg.clone()
    own.defrost()
    own.CLS.CREST.GENERATION = number
    own.CLS.CREST.LABELS = str(folders[number - 2] / LABELS_FILE) if number > 1 else ""
    own.SOLVER.MAX_ITER //= generations
    own.IMWA.EPISODES = max(cfg.IMWA.EPISODES // generations, 1)
    # Members of another generation are other members: they draw other batches.
    own.IMWA.FIRST_MEMBER += (number - 1) * cfg.IMWA.MEMBERS
    own.OUTPUT_DIR = str(folders[number - 1])
    own.freeze()
    return own


def train_all(
    generations: list[CfgNode],
    ranks: Ranks,
    train_one: Callable[[CfgNode], int],
    *,
    resumes: bool,
) -> int:
    """Train generations in turn, each on the labels of the one before.

    Args:
        generations: of `all_generations`.
        ranks: what `launch` hands its processes.
        train_one: trains a configuration; 0, or the status with which to end early.
        resumes: labels that an earlier call has made by the same model are taken, not made again.

    Returns:
        0, or the status of the generation that ended early.
    """
    for number, cfg in enumerate(generations, start=1):
        if len(generations) > 1:
            logger.info("generation %d of %d", number, len(generations))
        status = train_one(cfg)
        if status or number == len(generations):
            return status
        path = Path(cfg.OUTPUT_DIR) / LABELS_FILE
        if not (resumes and on_main(partial(_are_of_model, path), ranks.run)):
            _label(cfg, path, ranks)
    return 0


def _are_of_model(path: Path) -> bool:
    """Whether labels are there, and not of a run that the model's has overwritten."""
    made_by = newest_model(path.parent)
    return path.exists() and path.stat().st_mtime >= made_by.stat().st_mtime


def _label(cfg: CfgNode, path: Path, ranks: Ranks) -> None:
    """Label the unlabeled images by a finished generation's model, whose averages it ended with."""
    task = ClassificationTask(cfg, ranks)
    unlabeled = task.data.unlabeled
    assert unlabeled is not None  # CLS.CREST belongs to methods that have some
    model = task.load_model(str(newest_model(cfg.OUTPUT_DIR))).to(task.device).eval()
    # Images that cannot be read get no label if DATASETS.ON_BAD_RECORD leaves them out.
    readable, logits, _ = predict_readable(model, task.unlabeled_batches(), ranks.run)
    counts = task.data.labeled_counts
    rows, probabilities = torch.from_numpy(readable), torch.from_numpy(logits).softmax(1)
    if cfg.CLS.UNLABELED.MEMBERSHIP == "joint":  # labeled images are in the next set anyway
        is_other = ~labeled_among(unlabeled, task.data.labeled)[rows]
        rows, probabilities = rows[is_other], probabilities[is_other]
    chosen, labels = choose_labels(probabilities, keep_rates(counts, alpha=_options(cfg).alpha))
    positions = rows[chosen]
    on_main(lambda: write_labels(path, positions, labels), ranks.run)
    logger.info("%d of %d unlabeled images get a label", len(positions), len(unlabeled))
