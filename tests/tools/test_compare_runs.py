import shutil
from functools import partial

import pytest

from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import Evaluation, Results, write_results


@pytest.fixture
def compare(call):
    return partial(call, "compare_runs")


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
        "| data | method | IMWA | T | model | runs | seeds | AP | AP50 |",
        "|---|---|---|---|---|---|---|---|---|",
        "| digits | unbiased_teacher | no averaging | 600 | teacher | 2 | 1, 2 | 11.50 ± 0.71 "
        "| 40.00 ± 0.00 |",
        "| digits | unbiased_teacher | M = 2, E = 6 | 600 | teacher | 2 | 1, 2 | 13.00 ± 1.41 "
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
    _, out, _ = compare(runs[0], f"{runs[0]}/", runs[0] / "results.json")
    assert "| 1 | 1 | 11.00 | 40.00 |" in out


def write_config(run, *, threshold, output, seed):
    teacher = ["SSOD.ALGORITHM", "unbiased_teacher", "SSOD.BBOX_THRESHOLD", str(threshold)]
    cfg = load_config(overrides=[*teacher, "OUTPUT_DIR", output, "SEED", str(seed)])
    (run / "config.yaml").write_text(cfg.dump())


def test_runs_that_differ_in_a_setting_have_rows_named_by_their_folders(compare, runs, tmp_path):
    """A key that results.json lacks: both rows are of one seed and would have one name."""
    others = []
    for run, seed in zip(runs[:2], (1, 2), strict=True):
        others.append(shutil.copytree(run, tmp_path / f"low_{seed}"))
        write_config(run, threshold=0.7, output="a", seed=seed)
        write_config(others[-1], threshold=0.5, output="b", seed=seed)
    status, out, error = compare(*runs[:2], *others, "--metrics", "AP")
    assert (status, error) == (0, "")
    start = "| digits | unbiased_teacher | no averaging | 600 | teacher | 2 | 1, 2 |"
    assert out.splitlines()[2:] == [
        f"| members1_seed* {start} 11.50 ± 0.71 |",
        f"| low_* {start} 11.50 ± 0.71 |",
    ]


def test_runs_of_one_seed_that_differ_in_nothing_known_have_a_row_each(compare, runs, tmp_path):
    again = shutil.copytree(runs[0], tmp_path / "other" / runs[0].name)
    _, out, _ = compare(*runs[:2], again, "--metrics", "AP")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert [(row[0], row[6:]) for row in rows[2:]] == [
        (str(runs[0]), ["1", "1", "11.00"]),
        (runs[1].name, ["1", "2", "12.00"]),
        (str(again), ["1", "1", "11.00"]),
    ]


def test_a_damaged_config_is_one_line(compare, runs):
    for text, message in (
        ("a: [", "config.yaml line 1: is not valid YAML"),
        ("[1]", "config.yaml cannot be read"),
        ("3", "config.yaml cannot be read"),
    ):
        (runs[0] / "config.yaml").write_text(text)
        status, _, error = compare(runs[0])
        assert (status, error.count("\n")) == (2, 1)
        assert message in error


def test_a_table_in_a_file_is_as_wide_as_its_content(compare, runs):
    metrics = ["AP"] * 12
    _, out, _ = compare(*runs, "--format", "table", "--metrics", *metrics)
    assert "…" not in out
    assert "unbiased_teacher" in out
    assert out.count("11.50 ± 0.71") == 12


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


def test_a_figure_that_no_run_has_is_no_column_of_dashes(compare, runs):
    status, out, error = compare(*runs, "--metrics", "AP", "ap50")
    assert (status, out) == (2, "")
    assert "--metrics ap50: no run has it (choose from AP, AP50, APs)" in error


def test_a_baseline_may_be_spelled_otherwise(compare, runs):
    status, out, _ = compare(*runs, "--metrics", "AP", "--baseline", f"{runs[1]}/")
    assert status == 0
    assert "gain in AP" in out
