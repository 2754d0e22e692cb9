"""Which finished runs are of one kind, and what they have together."""

import math
import statistics

import pytest

from ssod_imwa.runs.groups import Spread, group_runs
from ssod_imwa.runs.results import Evaluation, Results, ResultsError


def results(seed=1, ap=10.0, **changes):
    """A run whose teacher has an AP at its end, and whose student has one less."""
    figures = (("student", ap - 1), ("teacher", ap))
    settings = {
        "task": "detection",
        "dataset": "digits_train 5 %",
        "method": "unbiased_teacher",
        "imwa": {"members": 2, "episodes": 4, "first_member": 0, "coefficients": []},
        "seed": seed,
        "iterations": 600,
        "wall_time": 12.5,
        "peak_memory": 1000,
        "evaluations": tuple(Evaluation(m, "final", 1, None, {"AP": x}) for m, x in figures),
        "fold": 1,
    }
    return Results(**{**settings, **changes})


def test_spread_is_the_sample_standard_deviation_without_nan():
    values = [3.0, 4.5, 7.25]
    spread = Spread.of([*values, math.nan])
    mean = sum(values) / 3
    assert spread.mean == pytest.approx(mean)
    assert spread.std == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / 2))
    assert spread.count == 3
    assert math.isnan(Spread.of([1.0]).std)
    assert math.isnan(Spread.of([]).mean)


def test_runs_of_equal_settings_form_a_group_whatever_their_seed_and_fold():
    runs = [results(1), results(2, fold=2), results(1, iterations=1200), results(3)]
    groups = group_runs(runs)
    assert [group.runs for group in groups] == [
        (runs[0], runs[1], runs[3]),
        (runs[2],),
    ]
    assert groups[0].seeds == (1, 2, 3)
    assert groups[0].spread("AP") == Spread(10.0, 0.0, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "bccd"},
        {"method": "supervised"},
        {"iterations": 599},
        {"imwa": {"members": 3, "episodes": 4, "first_member": 0, "coefficients": []}},
        {"imwa": {"members": 2, "episodes": 4, "first_member": 0, "coefficients": [0.5, 0.5]}},
    ],
)
def test_any_other_setting_makes_another_group(change):
    assert len(group_runs([results(1), results(2, **change)])) == 2


def test_how_nothing_is_averaged_makes_no_difference():
    plain = [results(i, imwa={"members": 1, "episodes": e}) for i, e in enumerate((1, 20))]
    never_part = results(2, imwa={"members": 2, "episodes": 4, "start": 1.0})
    assert len(group_runs([*plain, never_part])) == 1


@pytest.mark.parametrize("change", [{"outer.lr": 0.7}, {"outer.momentum": 0.9}, {"episodes": 4}])
def test_outer_steps_make_a_difference_to_one_member(change):
    stepped = {"members": 1, "episodes": 2, "outer.lr": 0.5, "outer.momentum": 0.0}
    assert len(group_runs([results(1, imwa=stepped), results(2, imwa=stepped)])) == 1
    assert len(group_runs([results(1, imwa=stepped), results(2, imwa={**stepped, **change})])) == 2
    assert len(group_runs([results(1, imwa=stepped), results(2, imwa={"members": 1})])) == 2


def test_resets_of_the_optimizer_make_a_difference_to_one_member():
    reset = {"members": 1, "episodes": 4, "optimizer_state": "reset"}
    for other in ({"members": 1, "episodes": 4}, {**reset, "episodes": 2}):
        assert len(group_runs([results(1, imwa=reset), results(2, imwa=other)])) == 2


def test_a_run_of_a_version_without_a_key_is_one_of_its_default():
    imwa = {"members": 2, "episodes": 4}
    old, new = results(1, imwa=imwa), results(2, imwa={**imwa, "start": 0.0})
    assert len(group_runs([old, new])) == 1
    assert len(group_runs([old, results(3, imwa={**imwa, "start": 0.25})])) == 2


def test_a_run_given_twice_is_refused():
    with pytest.raises(ResultsError, match=r"seed 2 .* is given twice"):
        group_runs([results(1), results(2), results(2)])
    other_member = {"members": 1, "episodes": 1, "first_member": 1}
    alone = {"members": 1, "episodes": 1, "first_member": 0}
    assert len(group_runs([results(imwa=alone), results(imwa=other_member)])) == 1


def test_runs_of_one_seed_are_told_apart_by_settings_or_else_by_name():
    runs = [results(1), results(2), results(1), results(2)]
    names = ["a1", "a2", "b1", "b2"]
    settings = [{"x": 0}, {"x": 0}, {"x": 1}, {"x": 1}]
    groups = group_runs(runs, names=names, settings=settings)
    assert [group.names for group in groups] == [("a1", "a2"), ("b1", "b2")]
    assert len(group_runs(runs[:3:2], settings=settings[:3:2])) == 2
    alone = [("a1",), ("a2",), ("b1",), ("b2",)]
    assert [group.names for group in group_runs(runs, names=names)] == alone
    settings[0] = None  # not known, so the others' cannot be compared with it
    assert [x.names for x in group_runs(runs, names=names, settings=settings)] == alone


def test_gains_are_taken_between_runs_of_equal_seed():
    plain = {"members": 1, "episodes": 1}
    base = [results(1, ap=10.0, imwa=plain), results(2, ap=20.0, imwa=plain)]
    better = [results(2, ap=21.5), results(1, ap=11.0), results(9, ap=90.0)]
    baseline, imwa = group_runs([*base, *better])
    gain = imwa.gain("AP", baseline)
    assert gain.count == 2  # seed 9 has no partner
    assert gain.mean == pytest.approx(1.25)
    assert gain.std == pytest.approx(statistics.stdev([1.0, 1.5]))
