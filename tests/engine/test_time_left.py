import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.engine.time_left import WINDOW, TimeLeft

SECONDS = {"burn-in": 0.5, "self-training": 2.0, "evaluation": 7.0, "between": 0.25}


class Clock:
    """`time.perf_counter` that moves when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ssod_imwa.engine.time_left.time.perf_counter", clock)
    return clock


def step_seconds(t, burn_in):
    return SECONDS["burn-in"] if t < burn_in else SECONDS["self-training"]


def evaluate(left, clock, seconds=SECONDS["evaluation"]):
    with left.evaluation():
        clock.now += seconds


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(("episodes", "members"), [(1, 1), (3, 2), (4, 3), (9, 1)])
@pytest.mark.parametrize("burn_in", [0, 5, 13])
def test_the_estimate_is_what_a_plain_loop_over_the_rest_sums_up(
    clock, episodes, members, burn_in, start
):
    """Announced work is right here, so the estimate is at every step, measured or not."""
    schedule = EpisodeSchedule(13, episodes=episodes, members=members, start=start)
    phases = {0: 1.0, burn_in: 4.0} if burn_in < 13 else {0: 1.0}
    left = TimeLeft(schedule, phases, evaluation_work=14.0 if burn_in else 3.5 * 4)
    positions = [schedule.position(g) for g in range(len(schedule))]
    before = [p.global_step for p in positions if p.ends_member]
    after = [p.global_step for p in positions if p.ends_episode for _ in range(2)]
    left.expect(before, after_row=False)
    left.expect(after, after_row=True)
    for position in positions:
        g = position.global_step
        if g:
            left.between(SECONDS["between"])
        left.step(position, step_seconds(position.t, burn_in))
        for _ in range(before.count(g)):
            evaluate(left, clock)
        rest = [p for p in positions if p.global_step > g]
        pending = sum(step > g for step in before) + sum(step >= g for step in after)
        expected = sum(step_seconds(p.t, burn_in) for p in rest)
        measured = SECONDS["evaluation"] if g >= before[0] else 14 * SECONDS["burn-in"]
        if burn_in == 0:
            measured = SECONDS["evaluation"]
        between = len(rest) * SECONDS["between"] * g / (g + 1)  # between n steps lie n - 1
        assert left.seconds(position) == pytest.approx(expected + pending * measured + between)
        for _ in range(after.count(g)):
            evaluate(left, clock)
    assert left.evaluation_seconds == pytest.approx(7 * (len(before) + len(after)))


def test_nothing_is_known_before_the_first_step():
    schedule = EpisodeSchedule(3)
    assert TimeLeft(schedule).seconds(schedule.position(0)) is None


def test_a_phase_that_is_not_announced_right_is_measured_once_it_has_begun():
    schedule = EpisodeSchedule(100)
    left = TimeLeft(schedule, {0: 1.0, 50: 1.0})
    for g in range(60):
        left.step(schedule.position(g), 1.0 if g < 50 else 3.0)
        assert left.seconds(schedule.position(g)) == pytest.approx(
            99 - g if g < 50 else 3 * (99 - g)
        )


def test_the_first_step_of_a_session_warms_up_and_old_ones_are_forgotten():
    schedule = EpisodeSchedule(1000)
    left = TimeLeft(schedule)
    left.step(schedule.position(0), 60.0)
    assert left.seconds(schedule.position(0)) == 60 * 999
    for g in range(1, WINDOW + 10):
        left.step(schedule.position(g), 2.0 if g < 10 else 1.0)
    assert left.seconds(schedule.position(9 + WINDOW)) == pytest.approx(990 - WINDOW)


def test_the_first_evaluation_of_a_session_warms_up(clock):
    """It imports what measures AP: 6 s beside 0.5 s, and 39 more to come."""
    schedule = EpisodeSchedule(1)
    left = TimeLeft(schedule)
    left.step(schedule.position(0), 1.0)
    left.expect([0] * 40, after_row=True)
    evaluate(left, clock, 6.0)
    assert left.seconds(schedule.position(0)) == 40 * 6.0
    for _ in range(3):
        evaluate(left, clock, 0.5)
        assert left.seconds(schedule.position(0)) == pytest.approx(40 * 0.5)
    assert left.evaluation_seconds == pytest.approx(7.5)


def test_a_step_that_waits_for_data_counts_with_its_share():
    """A median would not see that every fourth step takes five times as long."""
    schedule = EpisodeSchedule(1000)
    left = TimeLeft(schedule)
    for g in range(101):
        left.step(schedule.position(g), 5.0 if g % 4 == 0 else 1.0)
    assert left.seconds(schedule.position(100)) == pytest.approx(899 * 2.0)


def test_an_evaluation_that_is_left_does_not_count(clock):
    left = TimeLeft(EpisodeSchedule(3))
    with pytest.raises(ZeroDivisionError), left.evaluation():
        clock.now += 5 / 0
    assert left.evaluation_seconds == 0
