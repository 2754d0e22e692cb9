"""The losses by name, and the one of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from ssod_imwa.classification.losses.balanced_bce import BalancedBCE
from ssod_imwa.classification.losses.balanced_softmax import BalancedSoftmax
from ssod_imwa.classification.losses.base import Criterion
from ssod_imwa.classification.losses.cross_entropy import CrossEntropy
from ssod_imwa.classification.losses.focal import Focal
from ssod_imwa.classification.losses.gml import GML
from ssod_imwa.classification.losses.label_aware_smoothing import (
    LabelAwareSmoothing,
)
from ssod_imwa.classification.losses.ldam import LDAM
from ssod_imwa.config.options import Options, option, read_options
from ssod_imwa.errors import ConfigError, as_config_error

LOSSES: dict[str, type[Criterion]] = {
    loss.name: loss
    for loss in (
        CrossEntropy,
        Focal,
        LDAM,
        BalancedSoftmax,
        LabelAwareSmoothing,
        BalancedBCE,
        GML,
    )
}


@dataclass(frozen=True)
class LossChoice(Options):
    """The loss; the other keys of CLS.LOSS are its own."""

    name: str = option("cross_entropy", "loss of the logits", choices=tuple(LOSSES))


def build_criterion(cfg: CfgNode, counts: Sequence[int]) -> Criterion:
    """The loss of CLS.LOSS.

    Raises:
        ConfigError: a number is out of range, or the classifier is not what the loss needs.
    """
    loss = LOSSES[cfg.CLS.LOSS.NAME]
    model = cfg.CLS.MODEL
    if loss.of_cosines and not (model.CLASSIFIER == "cosine" and model.SCALE == 1):
        raise ConfigError(
            f"CLS.LOSS.NAME = {loss.name!r} needs CLS.MODEL.CLASSIFIER cosine and CLS.MODEL.SCALE "
            "1.0 (its loss scales the cosines by CLS.LOSS.SCALE)"
        )
    with as_config_error("CLS.LOSS"):
        return loss(counts, read_options(loss.options_class, cfg.CLS.LOSS))
