"""Lengths of episodes by the rate, against exact fractions and a plain loop."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.lengths import lengths_by_rate


def cosine(iterations):
    return [0.5 * (1 + math.cos(math.pi * t / iterations)) for t in range(iterations)]


def by_a_plain_loop(rates, episodes):
    """Step by step: an episode ends before the iteration that would pass its share of eta^2."""
    total = sum(Fraction(rate) ** 2 for rate in rates)
    lengths, length, done = [], 0, Fraction(0)
    for rate in rates:
        passed = done + Fraction(rate) ** 2
        if length and passed > total * (len(lengths) + 1) / episodes:
            lengths.append(length)
            length = 0
        length, done = length + 1, passed
    return [*lengths, length]


@pytest.mark.parametrize("rate", [1.0, 0.1, 3e-5])
@pytest.mark.parametrize(("iterations", "episodes"), [(7, 7), (10, 4), (100, 7), (997, 20), (5, 1)])
def test_a_constant_rate_gives_the_uniform_lengths(rate, iterations, episodes):
    schedule = EpisodeSchedule(iterations, episodes=episodes)
    uniform = [end - first for first, end in map(schedule.bounds, range(episodes))]
    assert lengths_by_rate([rate] * iterations, episodes) == uniform


@pytest.mark.parametrize(("iterations", "episodes"), [(100, 3), (600, 8), (1000, 20)])
def test_a_cosine_has_longer_and_longer_episodes(iterations, episodes):
    lengths = lengths_by_rate(cosine(iterations), episodes)
    assert lengths == by_a_plain_loop(cosine(iterations), episodes)
    assert sum(lengths) == iterations
    # Alike up to the rounding at both ends of an episode, or longer than the one before.
    assert all(later >= earlier - 1 for earlier, later in pairwise(lengths))
    assert lengths[-1] > 3 * lengths[0]


def test_a_tenth_of_the_rate_makes_episodes_a_hundred_times_as_long():
    rates = [1.0] * 50 + [0.1] * 5000  # equal shares
    assert lengths_by_rate(rates, 20) == [5] * 10 + [500] * 10


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [1, 1, 4]),
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], [4, 1, 1]),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1, 1, 4]),  # the first has more than two thirds
        ([1.0, 1.0, 1.0, 1.0, 1.0, 9.0], [4, 1, 1]),
    ],
)
def test_every_episode_has_an_iteration(rates, expected):
    assert lengths_by_rate(rates, 3) == expected


def test_a_rate_that_is_0_for_too_long_is_refused():
    with pytest.raises(ValueError, match=r"episodes = 3 .*must be 1\.\.2, the iterations with a"):
        lengths_by_rate([1.0, 0.0, 0.0, 0.5, 0.0], 3)
