"""BatchNorm statistics around an average."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssod_imwa.averaging.weights import State

logger = logging.getLogger(__name__)

# Running standard deviations between the members' means from which on a mean of variances is far
# from the variance of the members' pooled activations.
GAP = 3.0


def statistics_names(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Names, as in `named_state`, of the running mean and variance of every batch norm."""
    return [
        (f"{prefix}.{layer}running_mean", f"{prefix}.{layer}running_var")
        for prefix, module in modules.items()
        for layer, child in ((f"{n}." if n else "", c) for n, c in module.named_modules())
        if isinstance(getattr(child, "running_mean", None), Tensor)
        and isinstance(getattr(child, "running_var", None), Tensor)
    ]


@torch.no_grad()
def warn_if_far_apart(members: Sequence[State]) -> None:
    """Log the channel in which the members' running means differ most, if that is by over 3 sigma.

    Args:
        members: running means and variances of each member, by equal names.
    """
    gaps: dict[str, Tensor] = {}
    for name in members[0]:
        if name.endswith("running_mean"):
            variance = name.removesuffix("running_mean") + "running_var"
            means = torch.stack([member[name] for member in members]).double()
            variances = torch.stack([member[variance] for member in members]).double()
            spread = means.max(0).values - means.min(0).values
            # 1e-5 is BatchNorm's own guard against channels that never vary.
            gaps[name] = (spread / (variances.mean(0) + 1e-5).sqrt()).max()
    if not gaps:
        return
    worst, where = max((float(gap), name) for name, gap in gaps.items())
    if worst > GAP:
        logger.warning(
            "members' batch-norm means differ by %.1f running standard deviations (%s); the mean "
            'of their statistics is not that of the averaged model, consider bn = "recompute"',
            worst,
            where,
        )
