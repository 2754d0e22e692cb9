"""The serial order, against nested loops."""

import numpy as np
import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule, Position


def in_order(iterations, episodes, members, start=0):
    """Episodes, in each its members, of each its own iterations: by plain loops."""
    lengths = [start] if start else []
    lengths += np.diff([e * (iterations - start) // episodes for e in range(episodes + 1)]).tolist()
    first = 0
    for episode, length in enumerate(lengths):
        of_episode = 1 if start and episode == 0 else members
        for member in range(of_episode):
            for t in range(first, first + length):
                last = t == first + length - 1
                ends = last and member == of_episode - 1
                yield episode, member, t, t == first, last, ends, of_episode
        first += length


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(
    ("iterations", "episodes"), [(1, 1), (7, 1), (7, 7), (10, 4), (12, 5), (100, 7), (13, 12)]
)
def test_positions_against_plain_loops(iterations, episodes, members):
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=members)
    expected = [
        Position(g, *rest) for g, rest in enumerate(in_order(iterations, episodes, members))
    ]
    assert [schedule.position(g) for g in range(len(schedule))] == expected
    assert len(schedule) == members * iterations == len(expected)
    for position in expected:
        assert schedule.global_step(position.member, position.t) == position.global_step


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(
    ("iterations", "episodes", "start"), [(2, 1, 1), (7, 3, 3), (10, 2, 1), (12, 5, 7), (9, 1, 8)]
)
def test_a_common_part_precedes_the_episodes_of_several_members(
    iterations, episodes, start, members
):
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=members, start=start)
    expected = [
        Position(g, *rest) for g, rest in enumerate(in_order(iterations, episodes, members, start))
    ]
    assert [schedule.position(g) for g in range(len(schedule))] == expected
    assert len(schedule) == len(expected) == start + members * (iterations - start)
    for position in expected:
        assert schedule.global_step(position.member, position.t) == position.global_step
        assert schedule.members_in(position.episode) == position.members
    assert schedule.bounds(0) == (0, start)
    assert [schedule.number(e) for e in range(schedule.episodes)] == list(range(episodes + 1))


def test_other_members_take_no_iteration_of_the_common_part():
    schedule = EpisodeSchedule(10, episodes=2, members=2, start=4)
    assert schedule.global_step(0, 3) == 3
    with pytest.raises(IndexError, match="member = 1 is not in"):
        schedule.global_step(1, 3)
    assert schedule.global_step(1, 4) == 7


@pytest.mark.parametrize(("episodes", "members"), [(1, 1), (2, 3), (50, 2)])
def test_a_common_part_of_all_iterations_is_plain_training(episodes, members):
    schedule = EpisodeSchedule(10, episodes=episodes, members=members, start=10)
    plain = EpisodeSchedule(10)
    assert vars(schedule) == vars(plain)
    assert [schedule.position(g) for g in range(10)] == [plain.position(g) for g in range(10)]


@pytest.mark.parametrize(("iterations", "episodes"), [(180_000, 20), (180_001, 200), (97, 96)])
def test_lengths_differ_by_at_most_one(iterations, episodes):
    schedule = EpisodeSchedule(iterations, episodes=episodes)
    bounds = [schedule.bounds(e) for e in range(episodes)]
    lengths = {end - first for first, end in bounds}
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1
    assert bounds[0][0] == 0
    assert bounds[-1][1] == iterations


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1, 1), ValueError, "iterations = 0 is not allowed"),
        ((10, 0, 1), ValueError, "episodes = 0 is not allowed"),
        ((10, 11, 1), ValueError, r"episodes = 11 is not allowed \(must be 1..T = 10\)"),
        ((10, 1, 0), ValueError, "members = 0 is not allowed"),
        ((10.0, 1, 1), TypeError, "iterations = 10.0 is not allowed"),
        ((10, True, 1), TypeError, "episodes = True is not allowed"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    iterations, episodes, members = arguments
    with pytest.raises(error, match=message):
        EpisodeSchedule(iterations, episodes=episodes, members=members)


@pytest.mark.parametrize(
    ("start", "episodes", "error", "message"),
    [
        (-1, 1, ValueError, r"start = -1 is not allowed \(must be at least 0\)"),
        (11, 1, ValueError, r"start = 11 is not allowed \(must be 0..T = 10\)"),
        (0.5, 1, TypeError, "start = 0.5 is not allowed"),
        (8, 3, ValueError, r"episodes = 3 is not allowed \(must be 1..T - start = 2\)"),
    ],
)
def test_a_bad_common_part_is_refused(start, episodes, error, message):
    with pytest.raises(error, match=message):
        EpisodeSchedule(10, episodes=episodes, members=2, start=start)


@pytest.mark.parametrize("call", ["position(-1)", "position(20)", "bounds(5)", "bounds(-1)"])
def test_steps_outside_the_run_are_refused(call):
    schedule = EpisodeSchedule(10, episodes=5, members=2)
    with pytest.raises(IndexError, match="is not in 0"):
        eval(f"schedule.{call}")
    with pytest.raises(IndexError, match="member = 2"):
        schedule.global_step(2, 0)
    with pytest.raises(IndexError, match="t = 10"):
        schedule.global_step(0, 10)


@pytest.mark.parametrize("start", [0, 3])
def test_episodes_have_the_lengths_that_are_given(start):
    lengths = [1, 4, 2]
    schedule = EpisodeSchedule(start + 7, episodes=3, members=2, start=start, lengths=lengths)
    common = [start] if start else []
    bounds = [schedule.bounds(e) for e in range(schedule.episodes)]
    assert [end - first for first, end in bounds] == [*common, *lengths]
    seen = [schedule.position(g) for g in range(len(schedule))]
    ends = [p.global_step + 1 for p in seen if p.ends_episode]
    assert ends == np.cumsum([*common, 2, 8, 4]).tolist()
    assert all(schedule.global_step(p.member, p.t) == p.global_step for p in seen)
    for t in range(start, start + 7):
        assert [p.member for p in seen if p.t == t] == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "more", "error", "message"),
    [
        ([4, 4], {}, ValueError, r"lengths = \[4, 4\] are not allowed \(must be 2, .* the sum 7\)"),
        ([7], {}, ValueError, "must be 2, one an episode"),
        ([7, 0], {}, ValueError, r"lengths\[1\] = 0 is not allowed"),
        ([3.5, 3.5], {}, TypeError, r"lengths\[0\] = 3.5 is not allowed"),
    ],
)
def test_bad_lengths_are_refused(lengths, more, error, message):
    with pytest.raises(error, match=message):
        EpisodeSchedule(7, episodes=2, lengths=lengths, **more)


@pytest.mark.parametrize(("start", "episodes"), [(0, 3), (4, 2)])
def test_members_at_once_take_the_steps_that_they_take_in_turn(start, episodes):
    settings = {"episodes": episodes, "members": 3, "start": start}
    in_turn = EpisodeSchedule(11, **settings)
    steps = [in_turn.position(g) for g in range(len(in_turn))]
    for member in range(3):
        schedule = EpisodeSchedule(11, **settings, only=member)
        assert len(schedule) == 11
        for t, position in enumerate(map(schedule.position, range(11))):
            who = member if t >= start else 0
            (same,) = [p for p in steps if (p.member, p.t) == (who, t)]
            ends = {"ends_episode": same.ends_member}  # of all members at the same step
            assert position == same._replace(global_step=t, **ends)
            assert schedule.global_step(who, t) == t


def test_a_member_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"only = 2 is not allowed \(must be 0..M - 1 = 1\)"):
        EpisodeSchedule(4, members=2, only=2)
