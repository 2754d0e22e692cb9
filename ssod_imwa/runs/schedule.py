"""Which member trains when, of a run to come and of one that has finished."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.config.shared import common_iterations
from ssod_imwa.runs.results import Results


def build_schedule(cfg: CfgNode) -> EpisodeSchedule:
    """That of a configuration whose iterations are known (`Task.cfg`)."""
    imwa, iterations = cfg.IMWA, cfg.SOLVER.MAX_ITER
    return EpisodeSchedule(
        iterations,
        episodes=imwa.EPISODES,
        members=imwa.MEMBERS,
        start=common_iterations(imwa.START, iterations),
    )


def schedule_of(results: Results) -> EpisodeSchedule:
    """That of a finished run."""
    return EpisodeSchedule(
        results.iterations,
        episodes=results.imwa["episodes"],
        members=results.imwa["members"],
        start=results.common_iterations,
    )
