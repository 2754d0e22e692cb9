"""Where a run's burn-in ends, on each of the clocks that figures go by."""

from __future__ import annotations

from dataclasses import dataclass

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.runs.results import Results
from ssod_imwa.runs.schedule import schedule_of


@dataclass(frozen=True)
class BurnIn:
    """The end of burn-in.

    Attributes:
        iterations: B, own iterations of a member until then.
        global_steps: for each member that takes a turn, steps of the whole run until then.
        episodes: episodes until then, with a fraction; of a common part -1..0.

    Example:
        >>> BurnIn.of(EpisodeSchedule(8, episodes=2, members=2), 6)
        BurnIn(iterations=6, global_steps=(10, 14), episodes=1.5)
    """

    iterations: int
    global_steps: tuple[int, ...]
    episodes: float

    @classmethod
    def of(cls, schedule: EpisodeSchedule, iterations: int) -> BurnIn:
        """The end of burn-in in a schedule that goes on after it."""
        episode = schedule.position(schedule.global_step(0, iterations)).episode
        members = range(schedule.turns_in(episode))
        steps = tuple(schedule.global_step(member, iterations) for member in members)
        first, end = schedule.bounds(episode)
        finished = schedule.number(episode) - 1
        return cls(iterations, steps, finished + (iterations - first) / (end - first))


def burn_in_of(results: Results) -> BurnIn | None:
    """That of a run; None if it has none, or ends in it."""
    if not 0 < results.burn_in < results.iterations:
        return None
    return BurnIn.of(schedule_of(results), results.burn_in)
