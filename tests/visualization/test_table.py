import io
import math

from rich.console import Console

from ssod_imwa.runs.groups import group_runs
from ssod_imwa.runs.results import Evaluation, Results
from ssod_imwa.visualization.table import (
    comparison_markdown,
    comparison_rows,
    comparison_table,
    results_table,
)


def run(evaluations=None, *, seed=1, ap=30.0, members=2, **changes):
    if evaluations is None:
        evaluations = [Evaluation("teacher", "final", 0, None, {"AP": ap, "AP50": 2 * ap})]
    settings = {
        "task": "detection",
        "dataset": "digits",
        "method": "unbiased_teacher",
        "imwa": {"members": members, "episodes": 20, "store": "dict"},
        "seed": seed,
        "iterations": 600,
        "wall_time": 1.0,
        "peak_memory": 1,
        "evaluations": tuple(evaluations),
    }
    return Results(**{**settings, **changes})


def cells(table):
    """Texts of a rich table by rows, without styles and lines."""
    columns = [list(column.cells) for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def rendered(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_results_have_a_row_per_member_and_average_and_columns_per_model():
    table = results_table(
        run(
            [
                Evaluation("student", "member", 0, 0, {"AP": 10.0, "AP50": 20.0}),
                Evaluation("student", "member", 0, 1, {"AP": 11.0, "AP50": 21.0}),
                Evaluation("student", "average", 0, None, {"AP": 12.0, "AP50": 22.0}),
                Evaluation("student", "final", 1, None, {"AP": 13.004, "AP50": math.nan}),
                Evaluation("teacher", "final", 1, None, {"AP": 14.0, "AP50": 24.0}),
            ]
        )
    )
    assert [column.header.replace("\n", " ") for column in table.columns] == [
        "episode",
        "weights",
        "student AP",
        "student AP50",
        "teacher (EMA) AP",
        "teacher (EMA) AP50",
    ]
    assert cells(table) == [
        ["1", "member 1", "10.00", "20.00", "", ""],
        ["", "member 2", "11.00", "21.00", "", ""],
        ["", "average", "12.00", "22.00", "", ""],
        ["2", "final", "13.00", "–", "14.00", "24.00"],
    ]
    text = rendered(table)
    assert "unbiased_teacher on digits, M = 2, E = 20, seed 1" in text
    assert "14.00" in text


def test_results_show_the_figures_that_are_asked_for():
    item = Evaluation("student", "final", 0, None, {"AP": 1.0, "APs": 2.0, "VOC/AP50": 3.0})
    assert cells(results_table(run([item]), metrics=["APs"])) == [["1", "final", "2.00"]]
    assert cells(results_table(run([item]))) == [["1", "final", "1.00", "3.00"]]


def test_plain_training_has_no_averages_in_its_table():
    items = [
        Evaluation("student", x, i, None, {"AP": 1.0}) for i, x in ((0, "average"), (1, "final"))
    ]
    assert cells(results_table(run(items, members=1))) == [
        ["1", "episode's end", "1.00"],
        ["2", "final", "1.00"],
    ]


def test_a_run_without_evaluations_is_an_empty_table():
    assert cells(results_table(run([]))) == []


def test_a_comparison_has_mean_spread_seeds_and_gain():
    groups = group_runs(
        [
            run(seed=1, ap=30.0, members=1),
            run(seed=2, ap=32.0, members=1),
            run(seed=1, ap=31.0),
            run(seed=2, ap=34.0),
            run(seed=1, ap=30.5, members=1, iterations=1200),
        ]
    )
    header, rows = comparison_rows(groups, metrics=["AP"], baseline=groups[0])
    assert header == ["data", "method", "IMWA", "T", "model", "runs", "seeds", "AP", "gain in AP"]
    start = ["digits", "unbiased_teacher"]
    assert rows == [
        [*start, "no averaging", "600", "teacher", "2", "1, 2", "31.00 ± 1.41", ""],
        [*start, "M = 2, E = 20", "600", "teacher", "2", "1, 2", "32.50 ± 2.12", "+1.50 ± 0.71"],
        [*start, "no averaging", "1200", "teacher", "1", "1", "30.50", "+0.50"],
    ]
    assert cells(comparison_table(header, rows)) == rows


def test_settings_that_differ_are_shown_and_others_are_not():
    stream = {"members": 2, "episodes": 20, "store": "stream", "bn": "mean"}
    same = {"members": 2, "episodes": 20, "store": "dict", "bn": "mean"}
    alone = run(imwa={"members": 1, "episodes": 1, "store": "stream", "bn": "keep"})
    _, rows = comparison_rows(group_runs([run(imwa=same), run(imwa=stream), alone]))
    assert [row[2] for row in rows] == [
        "M = 2, E = 20, store = dict",
        "M = 2, E = 20, store = stream",
        "no averaging",
    ]


def test_a_common_part_is_shown():
    late = {"members": 2, "episodes": 4, "start": 0.5}
    _, rows = comparison_rows(group_runs([run(imwa=late), run(imwa=late | {"start": 0.0})]))
    assert [row[2] for row in rows] == ["M = 2, E = 4, START = 0.5", "M = 2, E = 4"]


def test_outer_steps_of_one_member_are_shown_and_what_changes_no_average_is_not():
    plain = {"members": 1, "episodes": 4, "outer.lr": 1.0, "outer.momentum": 0.0, "lawa": 0}
    runs = [
        run(imwa=plain | more) for more in ({}, {"outer.lr": 0.7}, {"outer.lr": 0.5, "lawa": 3})
    ]
    _, rows = comparison_rows(group_runs(runs))
    assert [row[2] for row in rows] == [
        "no averaging",
        "M = 1, E = 4, outer.lr = 0.7",
        "M = 1, E = 4, outer.lr = 0.5",
    ]


def test_folds_are_shown_if_there_are_several():
    _, rows = comparison_rows(group_runs([run(fold=1), run(fold=3), run(seed=2, fold=1)]))
    assert rows[0][5:7] == ["3", "1, 2 (folds 1, 3)"]
    _, rows = comparison_rows(group_runs([run(fold=3), run(seed=2, fold=3)]))
    assert rows[0][5:7] == ["2", "1, 2"]


def test_gains_are_not_shown_across_data_sets():
    groups = group_runs([run(members=1), run(dataset="bccd")])
    _, rows = comparison_rows(groups, metrics=["AP"], baseline=groups[0])
    assert rows[1][-1] == ""


def test_a_figure_that_a_run_lacks_is_a_dash():
    _, rows = comparison_rows(group_runs([run()]), metrics=["AP", "VOC/AP50"])
    assert rows[0][-2:] == ["30.00", "–"]


def test_markdown_is_one_line_a_row_and_escapes_bars():
    text = comparison_markdown(["a", "b"], [["1|2", "3"], ["4", "5"]])
    assert text.splitlines() == ["| a | b |", "|---|---|", "| 1\\|2 | 3 |", "| 4 | 5 |"]


def test_a_model_without_evaluations_of_averages_has_a_dash_in_the_summary():
    unfinished = run(
        [
            Evaluation("student", "running", 0, 0, {"AP": 10.0}),
            Evaluation("teacher", "running", 0, 0, {"AP": 12.0}),
            Evaluation("student", "average", 0, None, {"AP": 20.0}),
        ]
    )
    assert cells(results_table(unfinished))[-3] == ["", "best", "20.00", "–"]
