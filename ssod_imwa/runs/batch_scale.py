"""A recipe at another batch size: what changes with it so that training stays what it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.config.reader import keys, set_value, value_of
from ssod_imwa.config.shared import batch_sizes
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import DECAY_KEYS, ITERATION_KEYS, parse_config

BATCH = "SOLVER.IMS_PER_BATCH"
OVERRIDES = "IMWA.MEMBER_OVERRIDES"


@dataclass(frozen=True)
class Change:
    """A key before and after."""

    key: str
    before: Any
    after: Any


def scale_batch(cfg: CfgNode, images: int) -> tuple[CfgNode, list[Change]]:
    """A configuration for another number of labeled images an iteration, and what it changed.

    With r the new number over the old one, every stream has r times as many images; what counts
    iterations is divided by r, so that as many images are seen; the decay of a moving average
    becomes its r-th power, so that it averages over as many images. The learning rate of SGD goes
    with r, that of AdamW with the root of r.

    Args:
        cfg: of a run.
        images: new SOLVER.IMS_PER_BATCH, over all processes.

    Raises:
        ConfigError: the number is below 1, or what follows from it is not allowed, such as fewer
            images than SOLVER.ACCUMULATION_STEPS.

    Sources: Goyal et al. (arXiv 1706.02677) for SGD's rate, Malladi et al. (arXiv 2205.10287) for
    AdamW's, Busbridge et al. (arXiv 2307.13813) for moving averages.

    Example:
        >>> from ssod_imwa.runs.config import load_config
        >>> cfg = load_config(overrides=["SOLVER.IMS_PER_BATCH", "16", "SOLVER.BASE_LR", "0.01"])
        >>> scaled, changes = scale_batch(cfg, 4)
        >>> scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER == 4 * cfg.SOLVER.MAX_ITER
        (0.0025, True)
    """
    if images < 1:
        raise ConfigError(f"--scale-batch = {images} is not allowed (must be at least 1)")
    ratio = images / cfg.SOLVER.IMS_PER_BATCH
    streams = batch_sizes(cfg)
    changes = []
    scaled = cfg.clone()
    scaled.defrost()
    for key in keys(cfg):
        before = value_of(cfg, key)
        if key == BATCH:
            after: Any = images
        elif key in streams:
            after = max(1, round(ratio * before))
        elif key == OVERRIDES:
            after = [{k: _after(cfg, k, x, ratio) for k, x in block.items()} for block in before]
        else:
            after = _after(cfg, key, before, ratio)
        if after != before:
            set_value(scaled, key, after)
            changes.append(Change(key, before, after))
    return parse_config(scaled.dump(), f"--scale-batch {images}"), changes


def _after(cfg: CfgNode, key: str, before: Any, ratio: float) -> Any:
    """What becomes of a key that counts no images."""
    if key == "SOLVER.BASE_LR":
        sgd = cfg.SOLVER.OPTIMIZER == "SGD"
        return _rounded(before * (ratio if sgd else math.sqrt(ratio)))
    if key in ITERATION_KEYS:
        return _iterations(before, ratio)
    return _rounded(before**ratio) if key in DECAY_KEYS else before


def _iterations(before: Any, ratio: float) -> Any:
    if isinstance(before, list):  # two on one iteration are refused: they would be one decay
        return [round(step / ratio) for step in before]
    # What happens at all, or every so many iterations, still does: 0 would say never.
    return max(1, round(before / ratio)) if before else 0


def _rounded(number: float) -> float:
    """Without the last digits of floating-point arithmetic, which nobody wants to read."""
    return float(f"{number:.10g}")
