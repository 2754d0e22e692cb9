import importlib.util
import sys
from pathlib import Path

import pytest

from ssod_imwa.cli import run_main
from ssod_imwa.results import Evaluation, Results, write_results

TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


@pytest.fixture
def compare(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare_runs", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_main(tool.main)
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def runs(tmp_path):
    """Seeds 1 and 2, plain and averaged."""
    paths = []
    for members, gain in ((1, 0.0), (2, 1.0)):
        for seed in (1, 2):
            metrics = {"AP": 10.0 + seed + gain * seed, "AP50": 40.0, "APs": 5.0}
            path = tmp_path / f"members{members}_seed{seed}"
            path.mkdir()
            write_results(
                path / "results.json",
                Results(
                    task="detection",
                    dataset="digits",
                    method="unbiased_teacher",
                    imwa={"members": members, "episodes": 6},
                    seed=seed,
                    iterations=600,
                    wall_time=1.0,
                    peak_memory=1,
                    evaluations=(Evaluation("teacher", "final", 5, None, metrics),),
                ),
            )
            paths.append(path)
    return paths


def test_prints_markdown_with_mean_and_spread_over_seeds(compare, runs):
    status, out, _ = compare(*runs)
    assert status == 0
    assert out.splitlines() == [
        "| data | method | IMWA | T | model | seeds | AP | AP50 |",
        "|---|---|---|---|---|---|---|---|",
        "| digits | unbiased_teacher | no averaging | 600 | teacher | 1, 2 | 11.50 ± 0.71 "
        "| 40.00 ± 0.00 |",
        "| digits | unbiased_teacher | M = 2, E = 6 | 600 | teacher | 1, 2 | 13.00 ± 1.41 "
        "| 40.00 ± 0.00 |",
    ]


def test_gains_are_over_the_row_of_the_baseline(compare, runs):
    _, out, _ = compare(*runs, "--metrics", "AP", "--baseline", runs[1])
    assert out.splitlines()[-1].endswith("| 13.00 ± 1.41 | +1.50 ± 0.71 |")


def test_a_table_for_the_terminal(compare, runs):
    status, out, _ = compare(*runs[:1], "--format", "table", "--metrics", "APs")
    assert status == 0
    assert "5.00" in out
    assert "│" in out


def test_a_run_that_is_named_twice_counts_once(compare, runs):
    _, out, _ = compare(runs[0], runs[0])
    assert "| 1 | 11.00 | 40.00 |" in out


def test_mistakes_are_one_line_and_status_2(compare, runs, tmp_path):
    status, _, error = compare(runs[0], tmp_path)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "results.json does not exist" in error
    status, _, error = compare(runs[0], "--model", "student")
    assert (status, "no evaluation of the student" in error) == (2, True)
    status, _, error = compare(runs[0], "--baseline", runs[1])
    assert (status, "is not one of the given runs" in error) == (2, True)
