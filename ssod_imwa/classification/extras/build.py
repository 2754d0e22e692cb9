"""The extras of a configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.classification.extras.abc import ABCOptions, BalancedClassifier
from ssod_imwa.classification.extras.balanced_branch import BalancedBranch
from ssod_imwa.classification.extras.base import Extra
from ssod_imwa.classification.extras.semantic import SemanticAlignment
from ssod_imwa.classification.labelers.acr import ACR
from ssod_imwa.classification.labelers.base import Labeler
from ssod_imwa.classification.labelers.daso import DASO
from ssod_imwa.config.options import read_options
from ssod_imwa.errors import ConfigError


def build_extras(
    cfg: CfgNode, labeler: Labeler, counts: Sequence[int], device: torch.device
) -> list[Extra]:
    """What CLS.FIXMATCH.SECOND_HEAD and the labeler add to FixMatch.

    Args:
        cfg: of the run, with the schedule in iterations.
        labeler: FixMatch's.
        counts: labeled images of each class.
        device: of the network.

    Raises:
        ConfigError: second head and labeler do not go together, or a number is out of range.
    """
    head = cfg.CLS.FIXMATCH.SECOND_HEAD
    if (head == "balanced") != isinstance(labeler, ACR):
        raise ConfigError(
            f"CLS.FIXMATCH.SECOND_HEAD = {head!r} is not allowed with CLS.LABELER.NAME = "
            f"{labeler.name!r} ('balanced' and 'acr' belong together)"
        )
    extras: list[Extra] = []
    if isinstance(labeler, DASO):
        extras.append(SemanticAlignment(labeler, weight=labeler.options.semantic_weight))
    if isinstance(labeler, ACR):
        extras.append(BalancedBranch(labeler))
    if head == "abc":
        options = read_options(ABCOptions, cfg.CLS.ABC)
        iterations = cfg.SOLVER.MAX_ITER
        extras.append(
            BalancedClassifier(counts, options, labeler, iterations=iterations, device=device)
        )
    return extras
