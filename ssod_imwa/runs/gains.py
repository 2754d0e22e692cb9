"""What averages gained over their members on test images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ssod_imwa.runs.results import MODELS, Evaluation, Model


@dataclass(frozen=True)
class Gain:
    """One average beside its members.

    Attributes:
        episode: from 0.
        model: student or teacher.
        members: mean figure of the members; NaN if that of one is.
        best: of the best of them, likewise.
        average: figure of the average; NaN if there was nothing to measure.
    """

    episode: int
    model: Model
    members: float
    best: float
    average: float


def average_gains(evaluations: Sequence[Evaluation], metric: str) -> list[Gain]:
    """The averages whose members were evaluated, too: first all students, then all teachers.

    Args:
        evaluations: of one run.
        metric: name of the figure, of which more is better.
    """
    gains = []
    for model in MODELS:
        for episode in sorted({x.episode for x in evaluations}):
            same = [x for x in evaluations if (x.model, x.episode) == (model, episode)]
            members = [x.metrics.get(metric, math.nan) for x in same if x.stage == "member"]
            averages = [x for x in same if x.stage in ("average", "final")]
            if len(members) > 1 and averages:
                average = averages[-1].metrics.get(metric, math.nan)
                mean = statistics.fmean(members)
                best = mean if math.isnan(mean) else max(members)
                gains.append(Gain(episode, model, mean, best, average))
    return gains
