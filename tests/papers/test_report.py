from dataclasses import replace

import pytest

from ssod_imwa.papers.report import report, shown_evaluation
from ssod_imwa.papers.tables import Row, TableError
from ssod_imwa.runs.results import MODELS, Evaluation, Results, ResultsError


def test_paper_and_ours_stand_side_by_side(table_of, results_of):
    table = table_of(
        Row("CE", "ce", {"top1": 71.1}, "MFW, Table 2"),
        Row("MFW", "mfw", {"top1": 78.54}, "MFW, Table 2", against="CE"),
        Row("ours", "none"),
        Row("CDT", None, {"top1": 79.4}, "MFW, Table 2"),
    )
    runs = {
        ("ce", 1): results_of(1, 70.0),
        ("ce", 2): results_of(2, 72.0, few=5.0),
        ("mfw", 1): results_of(1, 75.0),
        ("mfw", 2): results_of(2, 79.0),
        ("mfw", 3): results_of(3, 10.0),
    }
    header, cells = report(table, table.rows, runs)
    gain = "gain in top1 ± s.e."
    assert header == ["method", "top1, paper", "top1", gain, "few", "seeds", "source"]
    assert cells[0] == ["CE", "71.1", "71.00 ± 1.41", "", "5.00", "2", "MFW, Table 2"]
    # Gains are of seeds 1 and 2, +5 and +7: seed 3 has no partner. s.e.: sqrt(2) / sqrt(2).
    assert cells[1][:4] == ["MFW", "78.54", "54.67 ± 38.73", "+6.00 ± 1.00 (n = 2)"]
    assert cells[1][-2:] == ["3", "MFW, Table 2"]
    assert cells[2] == ["ours", "", "–", "", "–", "0", ""]
    assert cells[3] == ["CDT", "79.4", "", "", "", "not run", "MFW, Table 2"]


def test_without_paper_or_gains_there_are_no_columns_for_them(table_of):
    table = table_of(Row("CE", "ce"), metrics=("top1",))
    assert report(table, table.rows, {})[0] == ["method", "top1", "seeds"]


def test_a_gain_counts_the_other_row_even_if_it_is_not_shown_evaluation(table_of, results_of):
    table = table_of(Row("CE", "ce"), Row("MFW", "mfw", against="CE"), metrics=("top1",))
    runs = {("ce", 1): results_of(1, 70.0), ("mfw", 1): results_of(1, 71.5)}
    _, (cells,) = report(table, table.rows[1:], runs)
    assert cells == ["MFW", "71.50", "+1.50", "1"]


def test_a_row_shows_the_headline_a_model_or_a_member(results_of):
    results = results_of(1, 70.0, teacher=72.0, members=(60.0, 61.0))
    assert shown_evaluation(Row("a", "r"), results).metrics["top1"] == 72.0
    assert shown_evaluation(Row("a", "r", model="student"), results).metrics["top1"] == 70.0
    assert shown_evaluation(Row("a", "r", member=1), results).metrics["top1"] == 60.0
    assert shown_evaluation(Row("a", "r", member=2), results).metrics["top1"] == 61.0
    with pytest.raises(TableError, match=r"^a: run r of seed 1 .* member 3 of 2 .*EVAL_MEMBERS"):
        shown_evaluation(Row("a", "r", member=3), results)
    with pytest.raises(ResultsError, match="teacher"):
        shown_evaluation(Row("a", "r", model="teacher"), results_of(1, 70.0))


def test_a_row_shows_the_mean_of_the_last_averages(results_of):
    results = results_of(1, 70.0, teacher=72.0)
    with pytest.raises(TableError, match=r"^a: run r of seed 1 holds no mean .* \(set IMWA.LAWA\)"):
        shown_evaluation(Row("a", "r", lawa=True), results)
    of_lawa = [
        Evaluation(m, "lawa", 3, None, {"top1": x})
        for m, x in zip(MODELS, (74.0, 75.0), strict=True)
    ]
    results = replace(results, evaluations=(*results.evaluations, *of_lawa))
    for model, top1 in ((None, 75.0), ("student", 74.0)):
        row = Row("a", "r", model=model, lawa=True)
        assert shown_evaluation(row, results).metrics["top1"] == top1
    assert shown_evaluation(Row("a", "r"), results).metrics["top1"] == 72.0


def test_the_last_evaluation_of_a_member_counts(results_of):
    results = results_of(1, 70.0, members=(60.0,))
    later = Evaluation("student", "member", 1, 0, {"top1": 65.0})
    results = Results(**{**vars(results), "evaluations": (*results.evaluations, later)})
    assert shown_evaluation(Row("a", "r", member=1), results).metrics["top1"] == 65.0
