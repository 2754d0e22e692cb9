"""Averaging of model weights: IMWA, EMA, soups. Needs torch and nothing else of this package."""

from ssod_imwa.averaging.ema import ModelEMA, constant_decay, warmup_decay
from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.lawa import LatestAverages
from ssod_imwa.averaging.lengths import lengths_by_rate
from ssod_imwa.averaging.outer import Outer
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.averaging.weights import (
    RunningAverage,
    State,
    average,
    copy_,
    named_state,
    snapshot,
)

__all__ = [
    "IMWA",
    "EpisodeSchedule",
    "Group",
    "LatestAverages",
    "ModelEMA",
    "Outer",
    "ParallelIMWA",
    "Position",
    "Ranks",
    "RunningAverage",
    "State",
    "average",
    "constant_decay",
    "copy_",
    "lengths_by_rate",
    "named_state",
    "snapshot",
    "warmup_decay",
]
