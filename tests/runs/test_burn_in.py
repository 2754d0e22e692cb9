from dataclasses import replace

import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.runs.burn_in import BurnIn, burn_in_of
from ssod_imwa.runs.results import Results


@pytest.mark.parametrize(("episodes", "members"), [(1, 1), (1, 2), (4, 3), (11, 2)])
@pytest.mark.parametrize("iterations", [1, 5, 10])
@pytest.mark.parametrize("start", [0, 6])
def test_the_end_is_where_a_walk_through_the_schedule_meets_it(
    episodes, members, iterations, start
):
    schedule = EpisodeSchedule(11 + start, episodes=episodes, members=members, start=start)
    end = BurnIn.of(schedule, iterations)
    positions = list(map(schedule.position, range(len(schedule))))
    first = [p for p in positions if p.t == iterations]  # of each member, after its burn-in
    assert end.global_steps == tuple(p.global_step for p in first)
    own = [p for p in positions if p.member == 0]
    before = {p.episode for p in own if p.t < iterations}
    whole = {e for e in before if all(p.t < iterations for p in own if p.episode == e)}
    common = 1 if start else 0  # it ends where episode 1 begins
    assert len(whole) - common <= end.episodes <= len(before) - common


def results(burn_in, **imwa):
    return Results(
        task="detection",
        dataset="digits",
        method="unbiased_teacher",
        imwa={"members": 2, "episodes": 3, **imwa},
        seed=1,
        iterations=12,
        wall_time=1.0,
        peak_memory=1,
        evaluations=(),
        burn_in=burn_in,
    )


@pytest.mark.parametrize("burn_in", [0, 12, 13])
def test_runs_that_have_none_or_end_in_it_have_no_end_of_it(burn_in):
    assert burn_in_of(results(burn_in)) is None


def test_the_schedule_is_that_of_the_run():
    assert burn_in_of(results(6)) == BurnIn(6, (10, 14), 1.5)
    uneven = (
        replace(results(6), episode_lengths=(4, 4, 4)),
        replace(results(6), episode_lengths=(1, 3, 8)),
    )
    assert [burn_in_of(x).episodes for x in uneven] == [1.5, 2.25]
    assert burn_in_of(results(6, start=0.75)) == BurnIn(6, (6,), 6 / 9 - 1)
    assert burn_in_of(results(6, start=0.25)) == BurnIn(6, (9, 12), 1.0)
    assert burn_in_of(results(6, start=1.0)) == BurnIn(6, (6,), 0.5)
