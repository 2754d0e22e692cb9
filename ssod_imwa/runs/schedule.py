"""Which member trains when, of a run to come and of one that has finished."""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.lengths import lengths_by_rate
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.config.averaging import common_iterations
from ssod_imwa.config.options import read_options
from ssod_imwa.config.shared import PartOfCosineOptions, StepOptions
from ssod_imwa.engine.solver import lr_multiplier
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.results import Results


def build_schedule(cfg: CfgNode, ranks: Ranks = Ranks.alone()) -> EpisodeSchedule:
    """That of a configuration whose iterations are known (`Task.cfg`).

    Args:
        cfg: the configuration.
        ranks: say which member this process trains; members take turns where it trains all.

    Raises:
        ConfigError: the learning rate is 0 for so long that it cannot divide a run into episodes.
    """
    imwa, iterations = cfg.IMWA, cfg.SOLVER.MAX_ITER
    start = common_iterations(imwa.START, iterations)
    return EpisodeSchedule(
        iterations,
        episodes=imwa.EPISODES,
        members=imwa.MEMBERS,
        start=start,
        only=ranks.member if ranks.members > 1 else None,
        lengths=_lengths_by_rate(cfg, start) if imwa.EPISODE_LENGTHS == "qsr" else None,
    )


def _lengths_by_rate(cfg: CfgNode, start: int) -> list[int] | None:
    multiplier = build_multiplier(cfg)
    rates = [multiplier(t) for t in range(start, cfg.SOLVER.MAX_ITER)]
    if not rates:
        return None
    try:
        return lengths_by_rate(rates, cfg.IMWA.EPISODES)
    except ValueError as error:
        raise ConfigError(
            f"IMWA.EPISODE_LENGTHS = 'qsr' is not allowed: {error} (keys: IMWA.EPISODES, SOLVER)"
        ) from error


def build_multiplier(cfg: CfgNode) -> Callable[[int], float]:
    """The factor of all learning rates at a member's own iteration."""
    solver = cfg.SOLVER
    in_steps = read_options(StepOptions, solver)
    return lr_multiplier(
        solver.LR_SCHEDULER_NAME,
        max_iter=solver.MAX_ITER,
        steps=in_steps.steps,
        gamma=in_steps.gamma,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
        cosine_cycles=read_options(PartOfCosineOptions, solver).cosine_cycles,
    )


def schedule_of(results: Results) -> EpisodeSchedule:
    """That of a finished run."""
    return EpisodeSchedule(
        results.iterations,
        episodes=results.imwa["episodes"],
        members=results.imwa["members"],
        start=results.common_iterations,
        lengths=results.episode_lengths or None,
        only=0 if results.imwa.get("parallel") else None,
    )
