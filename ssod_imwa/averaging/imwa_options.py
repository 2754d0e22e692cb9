"""What `IMWA` and `ParallelIMWA` are told: choices, what belongs together, and how it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ssod_imwa.averaging.checks import check_accumulate, check_coefficients
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.members import Rule
from ssod_imwa.averaging.optimizer_state import POLICIES

logger = logging.getLogger(__name__)

Recompute = Callable[[Mapping[str, nn.Module]], object]
BN = ("mean", "recompute", "keep")
NONFINITE = ("raise", "drop")


def check_options(
    *,
    optimizer: torch.optim.Optimizer | None,
    optimizer_state: str,
    bn: str,
    recompute_bn: Recompute | None,
    nonfinite: str,
    accumulate: str,
) -> None:
    """Raise ValueError if an option of `IMWA` is unknown, or would do nothing beside the others."""
    choices = (
        ("optimizer_state", optimizer_state, POLICIES),
        ("bn", bn, BN),
        ("nonfinite", nonfinite, NONFINITE),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} = {value!r} is not allowed (must be one of {allowed})")
    check_accumulate(accumulate)
    if optimizer is None and optimizer_state != "keep":
        raise ValueError(f"optimizer_state = {optimizer_state!r} needs the optimizer; give it")
    if (bn == "recompute") != (recompute_bn is not None):
        raise ValueError('bn = "recompute" and recompute_bn belong together; give both or neither')
    if nonfinite == "drop" and optimizer_state == "carry":
        raise ValueError(
            'nonfinite = "drop" with optimizer_state = "carry" is not allowed (the next member '
            'would inherit a momentum that is not finite; use "keep")'
        )


def announce(schedule: EpisodeSchedule, optimizer_state: str) -> None:
    """Log what IMWA is about to do."""
    episodes = schedule.episodes - schedule.parting
    length = (schedule.iterations - schedule.start) // episodes
    about = f"about {length}"
    if schedule.lengths is not None:
        length = max(schedule.lengths)
        about = f"{min(schedule.lengths)} to {length}"
    logger.info(
        "IMWA: %s%d members%s, %d episode%s of %s iteration%s, optimizer state: %s",
        f"after {schedule.start} iterations in common, " if schedule.start else "",
        schedule.members,
        "" if schedule.only is None else " at once",
        episodes,
        "s" if episodes > 1 else "",
        about,
        "s" if length > 1 else "",
        optimizer_state,
    )


def read_coefficients(
    coefficients: Sequence[float] | Rule | None, members: int
) -> tuple[Rule | None, list[float] | None]:
    """A rule or fixed values, None for equal ones; raises ValueError if they cannot be weights."""
    if callable(coefficients):
        return coefficients, None
    if coefficients is None:
        return None, None
    values = check_coefficients(coefficients, members)
    return None, None if len(set(values)) == 1 else values
