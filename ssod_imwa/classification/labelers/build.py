"""The labelers by name, and the one of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.classification.generations import GenerationOptions
from ssod_imwa.classification.labelers.acr import ACR
from ssod_imwa.classification.labelers.alignment import Alignment
from ssod_imwa.classification.labelers.base import Labeler
from ssod_imwa.classification.labelers.darp import DARP
from ssod_imwa.classification.labelers.daso import DASO
from ssod_imwa.classification.labelers.threshold import Threshold
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.config.averaging import common_iterations
from ssod_imwa.config.options import Options, option, read_options
from ssod_imwa.config.reader import value_of
from ssod_imwa.errors import ConfigError, as_config_error

logger = logging.getLogger(__name__)

LABELERS: dict[str, type[Labeler]] = {
    labeler.name: labeler for labeler in (Threshold, Alignment, DARP, DASO, ACR)
}


# Names of those that estimate what a mean over members may stand for.
WITH_STATISTICS = tuple(name for name, labeler in LABELERS.items() if labeler.averageable)


@dataclass(frozen=True)
class LabelerChoice(Options):
    """The labeler; the other keys of CLS.LABELER are its own."""

    name: str = option(
        "threshold",
        "what makes pseudo-labels of weak predictions: they themselves (FixMatch), aligned with a "
        "distribution (CReST+), of given class totals (DARP), blended with prototypes (DASO), "
        "adjusted by the prior (ACR)",
        choices=tuple(LABELERS),
    )


@dataclass(frozen=True)
class StatisticsOptions(Options):
    """CLS.FIXMATCH: what becomes of a labeler's estimates."""

    statistics: Literal["kept", "averaged"] = option(
        "kept",
        "estimates of members (histograms, distributions, refined labels) when weights are "
        "averaged: each its own, or the mean of all",
    )


@dataclass(frozen=True, eq=False)
class UnlabeledImages:
    """What methods are told of the unlabeled set.

    Attributes:
        images: N_u.
        labeled_counts: images of each class with labels of their own, (C,).
        also_labeled: bool (N_u,), which of them are labeled images, too; None for none.
        knows_truth: whether their hidden classes are known, for records.
    """

    images: int
    labeled_counts: Sequence[int]
    also_labeled: torch.Tensor | None = None
    knows_truth: bool = False


def build_labeler(cfg: CfgNode, model: ImageClassifier, unlabeled: UnlabeledImages) -> Labeler:
    """The labeler of CLS.LABELER.

    Args:
        cfg: of the run, with the schedule in iterations.
        model: the classifier, on the device on which the labeler's state is to be.
        unlabeled: images without labels.

    Raises:
        ConfigError: a number is out of range.
    """
    _check_schedule(cfg)
    kind = LABELERS[cfg.CLS.LABELER.NAME]
    counts, images = unlabeled.labeled_counts, unlabeled.images
    crest = read_options(GenerationOptions, cfg.CLS.get("CREST"))
    device = next(model.parameters()).device
    makers: dict[type[Labeler], Callable[[Any], Labeler]] = {
        Threshold: Threshold,
        Alignment: partial(
            Alignment,
            counts,
            generation=max(crest.generation, 1),
            generations=crest.generations,
            device=device,
        ),
        DARP: partial(DARP, counts, images, device=device, iterations=cfg.SOLVER.MAX_ITER),
        DASO: partial(DASO, counts, device=device, width=model.num_features),
        ACR: partial(ACR, counts, images, device=device, also_labeled=unlabeled.also_labeled),
    }
    with as_config_error("CLS.LABELER"):
        return makers[kind](read_options(kind.options_class, cfg.CLS.LABELER))


def check_queue(cfg: CfgNode, key: str) -> None:
    """Raise ConfigError if a queue of features, whose length is a key, does not hold a batch."""
    batch, queue = cfg.SOLVER.IMS_PER_BATCH, value_of(cfg, key)
    if batch > queue:
        raise ConfigError(
            f"{key} = {queue} is not allowed (must be at least SOLVER.IMS_PER_BATCH = {batch})"
        )


def _check_schedule(cfg: CfgNode) -> None:
    """Refuse a queue shorter than a batch; say where an average falls into an epoch of ACR."""
    labeler = cfg.CLS.LABELER
    if DASO.name == labeler.NAME:
        check_queue(cfg, "CLS.LABELER.QUEUE")
    if ACR.name == labeler.NAME and cfg.IMWA.MEMBERS > 1:
        _warn_of_averages_between_adjustments(cfg)


def _warn_of_averages_between_adjustments(cfg: CfgNode) -> None:
    epoch, imwa, iterations = cfg.CLS.LABELER.EPOCH, cfg.IMWA, cfg.SOLVER.MAX_ITER
    common = common_iterations(imwa.START, iterations)
    episode = (iterations - common) / imwa.EPISODES
    if imwa.EPISODE_LENGTHS != "uniform":
        words = f"episodes of IMWA.EPISODE_LENGTHS = {imwa.EPISODE_LENGTHS!r} are"
    elif common % epoch:
        words = f"IMWA.START = {imwa.START:g} of {iterations} iterations is"
    elif episode % epoch:
        words = f"an episode of {episode:g} iterations is"
    else:
        return
    logger.warning(
        "%s no multiple of CLS.LABELER.EPOCH = %d: averages fall between two adjustments of ACR",
        words,
        epoch,
    )
