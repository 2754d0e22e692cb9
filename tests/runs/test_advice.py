"""From numbers around an average to advice, rule by rule."""

import dataclasses
import math

import pytest

from ssod_imwa.runs.advice import (
    AverageNumbers,
    advice_lines,
    advise,
    measured_gain,
    numbers_in,
)
from ssod_imwa.runs.gains import Gain, average_gains
from ssod_imwa.runs.results import Evaluation

# Members of loss 1.0 and 1.2 at a full rate, neither close nor far apart.
USUAL = AverageNumbers(
    members=1.1, worst=1.2, average=0.99, recomputed=None, distance=0.08, rate=1.0
)


def numbers(**changes):
    return dataclasses.replace(USUAL, **changes)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, "gains", "averaging gains 10.0 % of the members' loss (distance 0.080)"),
        ({"average": 1.15}, "nothing", "gains -4.5 % of the members' loss, members are apart"),
        ({"average": 1.091, "rate": 0.2}, "nothing", "raise IMWA.EPISODES"),
        # A gain with members close by, and none.
        ({"distance": 0.049}, "close", "close (distance 0.049): fewer episodes would do"),
        ({"distance": 0.049, "average": 1.1}, "close", "episodes would do, or none"),
        ({"distance": 0.051}, "gains", "(distance 0.051)"),
        ({"distance": None}, "gains", "averaging gains 10.0 % of the members' loss"),
        # Worse than both ends, by more than a hundredth of the members' loss.
        ({"average": 1.212}, "barrier", "worse than both ends (loss 1.21, members up to 1.2)"),
        ({"average": 1.209}, "nothing", "raise IMWA.EPISODES"),
        ({"average": 1.3}, "barrier", "raise IMWA.EPISODES or START later"),
        ({"average": 9.0, "recomputed": 1.3}, "barrier", "(loss 1.3, members"),
        # Stale batch norms: a tenth of the members' loss is left in them.
        ({"average": 9.0, "recomputed": 0.9}, "stale", "from 9 to 0.9: set IMWA.BN recompute"),
        ({"average": 0.99, "recomputed": 0.87}, "stale", "gains 10.0 % of the members' loss; its"),
        ({"average": 0.99, "recomputed": 0.89}, "gains", "10.0 %"),
        ({"average": 0.99, "recomputed": 2.0}, "gains", "10.0 %"),
        # A rate near zero explains small gains and small distances, but no large gain.
        ({"average": 1.09, "rate": 0.09, "distance": 0.01}, "annealed", "gone to 9 % of its high"),
        ({"average": 1.09, "rate": 0.0}, "annealed", "left to remove (it gains 0.9 % of the"),
        ({"average": 1.09, "rate": 0.11, "distance": 0.01}, "close", "0.9 %"),
        ({"average": 0.98, "rate": 0.0}, "gains", "10.9 %"),
    ],
)
def test_rules(changes, kind, words):
    advice = advise([numbers(**changes)])
    assert (advice.kind, words in advice.text) == (kind, True), advice.text
    assert "\n" not in advice.text


@pytest.mark.parametrize(
    ("averages", "words"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], None),  # too few
        ([1.0] * 6, None),
        ([0.77, 0.77, 0.77, 0.99, 0.99, 0.99], "averaging gains 10.0 % of the members' loss, "
         "falling from 30.0 %"),
        ([9.0, 0.99, 0.99, 0.99, 0.77, 0.77, 0.77], "30.0 % of the members' loss, rising from 10"),
        ([0.88, 0.88, 0.88, 0.99, 0.99, 0.97], None),  # 20 to 10.6 %: within a half
    ],
)  # fmt: skip
def test_the_trend_is_that_of_three_averages_against_three(averages, words):
    text = advise([numbers(average=value) for value in averages]).text
    assert "falling" not in text and "rising" not in text if words is None else words in text


@pytest.mark.parametrize(
    ("before", "worst", "kind"),
    [(0.3, 2.5, "broken"), (0.3, 0.89, "gains"), (0.01, 0.09, "gains"), (0.04, 0.2, "broken")],
)
def test_a_member_whose_loss_tripled_has_broken_down(before, worst, kind):
    course = [numbers(members=before, worst=before, average=0.9 * before)]
    members = (before + worst) / 2
    course.append(numbers(members=members, worst=worst, average=0.8 * members))
    advice = advise(course)
    assert advice.kind == kind
    if kind == "broken":
        assert f"went from {before:g} to {worst:g} in this episode" in advice.text
    assert advise(course[1:]).kind == "gains"  # of the first episode nothing is known


def test_what_test_images_say_comes_first():
    assert advise([USUAL], measured="0.8 AP").text.startswith("averaging gains 0.8 AP, 10.0 % of")


def test_a_loss_that_is_no_number_is_said_to_be_none():
    nan, inf = float("nan"), float("inf")
    unknown = "what averaging gains could not be measured"
    for recomputed in (None, nan):
        advice = advise([numbers(average=nan, recomputed=recomputed)])
        assert advice.kind == "unmeasured"
        assert advice.text == f"{unknown}: the average's loss is no number"
    text = advise([numbers(average=nan)], measured="0.8 AP").text
    assert text == "averaging gains 0.8 AP: the average's loss is no number"
    for value in (nan, inf):
        advice = advise([numbers(average=value, recomputed=0.9)])
        assert advice.kind == "stale"
        assert advice.text.startswith(f"{unknown}; its batch norms are stale: re-estimated they")
    assert advise([numbers(average=inf)]).kind == "barrier"
    course = [numbers(average=value) for value in (nan, 0.77, 0.77, 0.99, 0.99, 0.99)]
    assert "nan" not in advise(course).text  # five of them are no trend


def test_a_figure_that_is_no_number_is_said_to_be_none():
    nan = float("nan")
    members = [evaluation("member", 40.0, member=0), evaluation("member", 41.0, member=1)]
    without = [evaluation("member", nan, member=2), evaluation("average", 41.5)]
    for evaluations in ([*members, evaluation("average", nan)], [*members, *without]):
        measured = measured_gain(evaluations, 0)
        text = advise([USUAL], measured=measured).text
        words = "averaging gains AP that could not be measured, 10.0 % of the members' loss"
        assert text.startswith(words)
        assert "nan" not in text
    (gain,) = average_gains([*without, *members], "AP")
    assert math.isnan(gain.members)
    assert math.isnan(gain.best)


def test_rows_hold_the_numbers_that_are_read_from_them():
    full, bare = numbers(recomputed=0.5), numbers(distance=None)
    rows = [
        {"episode": 0, "total_loss": 3.0},
        {"episode": 0, **full.row()},
        {"episode": 1, **bare.row()},
        {"episode": 2, **bare.row(), "advice/average": None},  # it was not finite
    ]
    assert numbers_in(rows) == {0: full, 1: bare}
    assert advice_lines(rows) == {
        0: advise([full]).text,
        1: advise([full, bare]).text,
        2: "what averaging gains could not be measured: a loss is no number",
    }
    assert full.row()["advice/gain_percent"] == pytest.approx(10)
    assert full.row()["advice/barrier_percent"] == pytest.approx(100 * (0.5 - 1.2) / 1.1)
    assert full.row()["advice/stale_percent"] == pytest.approx(100 * (0.99 - 0.5) / 1.1)
    assert not {"advice/distance", "advice/stale_percent"} & bare.row().keys()


def evaluation(stage, value, *, episode=0, member=None, model="student"):
    return Evaluation(model, stage, episode, member, {"AP": value, "AP-cat": 7.0})


def test_gains_are_over_the_mean_of_the_members():
    evaluations = [
        evaluation("member", 40.0, member=0),
        evaluation("member", 41.0, member=1),
        evaluation("average", 41.5),
        evaluation("average", 50.0, model="teacher"),  # whose members were not evaluated
        evaluation("member", 42.0, member=0, episode=1),
        evaluation("member", 42.0, member=1, episode=1),
        evaluation("final", 41.8, episode=1),
    ]
    assert average_gains(evaluations, "AP") == [
        Gain(0, "student", 40.5, 41.0, 41.5),
        Gain(1, "student", 42.0, 42.0, 41.8),
    ]
    assert measured_gain(evaluations, 0) == "1.0 AP"
    assert measured_gain(evaluations, 1) == "-0.2 AP"
    assert measured_gain(evaluations[2:4], 0) == measured_gain([], 0) == ""
