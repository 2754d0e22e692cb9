"""From numbers of a finished run to answers, question by question."""

import dataclasses

import numpy as np
import pytest

from ssod_imwa.analysis.hindsight import RunNumbers, Trend, advice, answers, trend

FLAT, RISING, NOISY = Trend(0.1, 0.4, 8), Trend(3.0, 0.5, 8), Trend(1.0, 4.0, 8)
# A saturated run at a constant rate, without EMA, whose snapshots' mean is 2 points better.
USUAL = RunNumbers("AP", 40.0, None, 42.0, 5, 1.0, FLAT)


def answered(question, **changes):
    run = dataclasses.replace(USUAL, **changes)
    (answer,) = [a for a in answers(run) if a.question == question]
    assert answer.line().split()[: len(question.split())] == question.split()
    return answer


@pytest.mark.parametrize(
    ("question", "changes", "verdict", "words"),
    [
        ("longer run", {}, "no", "rose by 0.1 ± 0.4 over the second half (8 evaluations): satur"),
        ("longer run", {"trend": RISING}, "yes", "3.0 ± 0.5"),
        ("longer run", {"trend": RISING, "rate": 0.4}, "unclear", "the rate fell"),
        ("longer run", {"trend": NOISY}, "unclear", "too noisy"),
        ("longer run", {"trend": Trend(0.6, 0.4, 4)}, "no", "saturated"),
        ("longer run", {"trend": None}, "unclear", "fewer than 4 evaluations of AP in the second"),
        # 36 points are left to 100 above the teacher, a quarter of which is 9.
        (
            "longer run",
            {"trend": NOISY, "teacher": 64.0, "training": 72.0},
            "yes",
            "72.0 AP on tra",
        ),
        ("longer run", {"trend": NOISY, "teacher": 64.0, "training": 74.0}, "unclear", "too noisy"),
        ("longer run", {"trend": RISING, "teacher": 64.0, "training": 90.0}, "yes", "3.0 ± 0.5"),
        (
            "longer run",
            {"trend": RISING, "teacher": 64.0, "training": 92.0},
            "unclear",
            "but 92.0 AP on training images: they are learned",
        ),
        # Nothing is left to 100, or nothing is fit at all.
        (
            "longer run",
            {"trend": NOISY, "teacher": 100.0, "training": 99.0},
            "unclear",
            "too noisy",
        ),
        ("longer run", {"trend": NOISY, "teacher": 1.0, "training": 0.0}, "yes", "0.0 AP on train"),
        # A last student alone, whose rate was not lowered, fits nothing well.
        ("longer run", {"trend": RISING, "training": 92.0}, "yes", "3.0 ± 0.5"),
        ("longer run", {"trend": RISING, "rate": 0.0, "training": 54.0}, "yes", "hardly better"),
        (
            "longer run",
            {"trend": RISING, "rate": 0.0, "training": 56.0},
            "unclear",
            "the rate fell",
        ),
        (
            "longer run",
            {"trend": None, "rate": 0.0, "training": 41.0},
            "yes",
            "41.0 AP on training",
        ),
        ("longer run", {"trend": None, "training": 41.0}, "unclear", "fewer than 4 evaluations"),
        ("longer run", {"rate": 0.0, "training": 41.0}, "no", "saturated"),
        ("lower rate", {}, "yes", "100 % of its highest, and averages over time are 2.0 AP above"),
        ("lower rate", {"rate": 0.4}, "no", "40 % of its highest: it was lowered"),
        ("lower rate", {"lawa": 40.4}, "no", "little noise"),
        ("lower rate", {"lawa": None}, "unclear", "no average"),
        ("lower rate", {"lawa": None, "teacher": 41.0}, "yes", "1.0 AP above"),
        ("EMA", {}, "yes", "kept none; the mean of its last 5 snapshots is 2.0 AP above"),
        ("EMA", {"teacher": 40.6}, "yes", "the teacher is 0.6 AP above the last student"),
        ("EMA", {"teacher": 39.0}, "no", "1.0 AP below"),
        ("EMA", {"lawa": None}, "unclear", "only one snapshot"),
        ("LAWA", {}, "yes", "the mean of the last 5 snapshots is 2.0 AP above"),
        ("LAWA", {"lawa": 40.4}, "no", "0.4 AP above"),
        ("LAWA", {"lawa": None}, "unclear", "SOLVER.CHECKPOINT_KEEP"),
        ("IMWA", {}, "yes", "saturated, and averages over time are 2.0 AP above"),
        ("IMWA", {"rate": 0.09}, "no", "nothing is left to remove"),
        ("IMWA", {"trend": RISING}, "no", "not saturated"),
        (
            "IMWA",
            {"trend": RISING, "teacher": 41.0, "training": 90.0},
            "unclear",
            "perhaps saturated",
        ),
        ("IMWA", {"trend": NOISY}, "unclear", "perhaps saturated"),
        ("IMWA", {"trend": None}, "unclear", "not known"),
        ("IMWA", {"lawa": None}, "unclear", "not known"),
        ("IMWA", {"lawa": 40.4}, "no", "only 0.4 AP of noise"),
        ("IMWA", {"teacher": 42.1}, "no", "the EMA has removed"),
        ("IMWA", {"teacher": 42.1, "lawa": None}, "no", "the EMA has removed"),
        ("IMWA", {"teacher": 41.0}, "yes", "2.0 AP above"),
    ],
)
def test_answers(question, changes, verdict, words):
    answer = answered(question, **changes)
    assert (answer.verdict, words in answer.reason) == (verdict, True), answer


@pytest.mark.parametrize(
    ("changes", "action", "words"),
    [
        ({}, "LAWA", "2.0 AP above the last student, for no steps; a rate that falls may do the"),
        ({"rate": 0.4}, "LAWA", "for no steps"),
        ({"teacher": 42.5}, "EMA", "ship it: 2.5 AP above"),
        ({"teacher": 41.5}, "LAWA", "ship it: 2.0 AP above"),
        ({"teacher": 41.5, "lawa": None}, "EMA", "1.5 AP above"),
        ({"trend": RISING}, "longer run", "first of all: AP rose by 3.0 ± 0.5"),
        ({"trend": RISING, "rate": 0.4}, "LAWA", "for no steps"),
        ({"trend": RISING, "teacher": 42.5, "training": 90.0}, "EMA", "ship it: 2.5 AP above"),
        ({"trend": NOISY}, "LAWA", "for no steps"),
        ({"lawa": 40.4}, "nothing", "as good as"),
        ({"lawa": None}, "nothing", "as good as"),
    ],
)
def test_advice(changes, action, words):
    answer = advice(dataclasses.replace(USUAL, **changes))
    assert (answer.question, answer.verdict) == ("advice", action)
    assert words in answer.reason
    assert answer.reason.endswith("steps") == (action != "nothing" and "rate" in changes)


def test_each_question_is_answered_once():
    questions = [answer.question for answer in answers(USUAL)]
    assert questions == ["longer run", "lower rate", "EMA", "LAWA", "IMWA"]


@pytest.mark.parametrize("seed", range(3))
def test_the_trend_is_the_least_squares_line_of_the_second_half(seed):
    random = np.random.default_rng(seed)
    t = np.sort(random.choice(np.arange(1, 201), 30, replace=False))
    y = 20 + 0.05 * t + random.normal(size=30)
    late = t > 100
    (slope, start), covariance = np.polyfit(t[late], y[late], 1, cov=True)
    residuals = y[late] - start - slope * t[late]
    correlation = max(0, np.dot(residuals[1:], residuals[:-1]) / np.dot(residuals, residuals))
    variance = covariance[0, 0] * (1 + correlation) / (1 - correlation)
    course = trend(list(zip(t.tolist(), y.tolist(), strict=True)), 200)
    assert course.rise == pytest.approx(100 * slope)
    assert course.error == pytest.approx(100 * np.sqrt(variance))
    assert course.evaluations == late.sum()


def test_the_wandering_of_an_average_is_seldom_taken_for_a_trend():
    """Flat runs whose noise an average carries from one evaluation to the next."""
    random = np.random.default_rng(0)
    rising = 0
    for _ in range(400):
        noise = [0.0]
        for _ in range(40):
            noise.append(0.7 * noise[-1] + random.normal())
        points = [(t, 50 + y) for t, y in enumerate(noise)]
        rising += trend(points, 40).is_rising
    assert 0 < rising / 400 < 0.15  # without the correlation 0.20, without correlated noise 0.03


def test_undefined_figures_are_no_evaluations():
    points = [(60, 1.0), (70, float("nan")), (80, 1.0), (90, 1.0)]
    assert trend(points, 100) is None
    assert trend([*points, (100, 1.0)], 100) == Trend(0.0, 0.0, 4)
