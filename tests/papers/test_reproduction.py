import math
from pathlib import Path

import pytest

from ssod_imwa.config import load_config
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.errors import ConfigError
from ssod_imwa.papers.reproduction import (
    check_recipe,
    finished,
    report,
    run_config,
    scaled,
    shown,
    write_recipe,
)
from ssod_imwa.papers.tables import Row, Run, Table, TableError
from ssod_imwa.runs.results import Evaluation, Results, ResultsError, write_results


def table_of(*rows, metrics=("top1", "few"), runs=()):
    return Table(Path("t.yaml"), "T", metrics, {run.name: run for run in runs}, rows)


def results_of(seed, top1, *, teacher=None, members=(), stage="final", few=math.nan):
    found = [
        Evaluation("student", "member", 0, m, {"top1": value}) for m, value in enumerate(members)
    ]
    found.append(Evaluation("student", stage, 0, None, {"top1": top1, "few": few}))
    if teacher is not None:
        found.append(Evaluation("teacher", stage, 0, None, {"top1": teacher}))
    return Results(
        task="classification",
        dataset="d",
        method="m",
        imwa={"members": max(1, len(members)), "episodes": 1},
        seed=seed,
        iterations=1,
        wall_time=1.0,
        peak_memory=1,
        evaluations=tuple(found),
    )


def test_paper_and_ours_stand_side_by_side():
    table = table_of(
        Row("CE", "ce", {"top1": 71.1}, "MFW, Table 2"),
        Row("MFW", "mfw", {"top1": 78.54}, "MFW, Table 2", against="CE"),
        Row("ours", "none"),
    )
    found = {
        ("ce", 1): results_of(1, 70.0),
        ("ce", 2): results_of(2, 72.0, few=5.0),
        ("mfw", 1): results_of(1, 75.0),
        ("mfw", 2): results_of(2, 79.0),
        ("mfw", 3): results_of(3, 10.0),
    }
    header, cells = report(table, table.rows, found)
    assert header == ["method", "top1, paper", "top1", "gain in top1", "few", "seeds", "source"]
    assert cells[0] == ["CE", "71.1", "71.00 ± 1.41", "", "5.00", "2", "MFW, Table 2"]
    # Gains are of seeds 1 and 2, +5 and +7: seed 3 has no partner.
    assert cells[1][:4] == ["MFW", "78.54", "54.67 ± 38.73", "+6.00 ± 1.41"]
    assert cells[1][-2:] == ["3", "MFW, Table 2"]
    assert cells[2] == ["ours", "", "–", "", "–", "0", ""]


def test_without_paper_or_gains_there_are_no_columns_for_them():
    table = table_of(Row("CE", "ce"), metrics=("top1",))
    assert report(table, table.rows, {})[0] == ["method", "top1", "seeds"]


def test_a_gain_counts_the_other_row_even_if_it_is_not_shown():
    table = table_of(Row("CE", "ce"), Row("MFW", "mfw", against="CE"), metrics=("top1",))
    found = {("ce", 1): results_of(1, 70.0), ("mfw", 1): results_of(1, 71.5)}
    _, (cells,) = report(table, table.rows[1:], found)
    assert cells == ["MFW", "71.50", "+1.50", "1"]


def test_a_row_shows_the_headline_a_model_or_a_member():
    results = results_of(1, 70.0, teacher=72.0, members=(60.0, 61.0))
    assert shown(Row("a", "r"), results).metrics["top1"] == 72.0
    assert shown(Row("a", "r", model="student"), results).metrics["top1"] == 70.0
    assert shown(Row("a", "r", member=1), results).metrics["top1"] == 60.0
    assert shown(Row("a", "r", member=2), results).metrics["top1"] == 61.0
    with pytest.raises(TableError, match=r"^a: run r of seed 1 .* member 3 of 2 .*EVAL_MEMBERS"):
        shown(Row("a", "r", member=3), results)
    with pytest.raises(ResultsError, match="teacher"):
        shown(Row("a", "r", model="teacher"), results_of(1, 70.0))


def test_the_last_evaluation_of_a_member_counts():
    results = results_of(1, 70.0, members=(60.0,))
    later = Evaluation("student", "member", 1, 0, {"top1": 65.0})
    results = Results(**{**vars(results), "evaluations": (*results.evaluations, later)})
    assert shown(Row("a", "r", member=1), results).metrics["top1"] == 65.0


def test_scaling_shortens_everything_that_counts_iterations():
    cfg = load_config(
        overrides=[
            *("SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "[600, 800]", "SOLVER.WARMUP_ITERS", "40"),
            *("SSOD.BURN_IN_ITERS", "300", "IMWA.EPISODES", "20"),
        ]
    )
    tenth = scaled(cfg, 0.1)
    assert (tenth.SOLVER.MAX_ITER, tenth.SOLVER.STEPS) == (100, [60, 80])
    assert (tenth.SOLVER.WARMUP_ITERS, tenth.SSOD.BURN_IN_ITERS) == (4, 30)
    assert tenth.IMWA.EPISODES == 20
    assert scaled(cfg, 2.0).SOLVER.MAX_ITER == 2000
    assert scaled(cfg, 1.0) == cfg


def test_scaling_leaves_an_iteration_to_an_episode():
    cfg = load_config(
        overrides=["SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "[600, 800]", "IMWA.EPISODES", "20"]
    )
    assert scaled(cfg, 0.01).IMWA.EPISODES == 10
    least = scaled(cfg, 1e-9)
    assert (least.SOLVER.MAX_ITER, least.IMWA.EPISODES, least.SOLVER.STEPS) == (1, 1, [0])


def test_scaling_refuses_epochs_and_factors_that_make_no_sense():
    epochs = load_config(overrides=["CLS.SCHEDULE.EPOCHS", "3"])
    with pytest.raises(ValueError, match=r"CLS.SCHEDULE.EPOCHS = 3.0 is not allowed"):
        scaled(epochs, 0.5)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"must be above 0"):
            scaled(load_config(), factor)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("SEED: 9\nSOLVER: {MAX_ITER: 7}\nMODEL: {WEIGHTS: imagenet}\n")
    return path


def test_overrides_come_in_order_table_run_command_line(recipe, tmp_path):
    run = Run("r", (recipe,), ("SOLVER.MAX_ITER", "8", "LOG_PERIOD", "3"))
    table = table_of(runs=[run])
    cfg = run_config(table, run, seed=4, output=tmp_path / "out")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.LOG_PERIOD) == (4, 8, 3)
    assert Path(cfg.OUTPUT_DIR) == tmp_path / "out"
    assert cfg.MODEL.WEIGHTS == "imagenet"
    cfg = run_config(
        table,
        run,
        seed=4,
        output=tmp_path,
        initial=tmp_path / "first",
        overrides=["LOG_PERIOD", "5"],
    )
    assert cfg.LOG_PERIOD == 5
    assert Path(cfg.MODEL.WEIGHTS) == tmp_path / "first"


def test_a_wrong_override_is_blamed_on_who_wrote_it(recipe, tmp_path):
    good, bad = Run("r", (recipe,)), Run("s", (recipe,), ("SOLVER.MAX_ITR", "8"))
    table = table_of(runs=[good, bad])
    with pytest.raises(ConfigError, match=r"^t.yaml: runs.s: .*SOLVER.MAX_ITR is not a config"):
        run_config(table, bad, seed=1, output=tmp_path)
    with pytest.raises(ConfigError, match=r"^command line: SOLVER.MAX_ITR is not a config"):
        run_config(table, good, seed=1, output=tmp_path, overrides=["SOLVER.MAX_ITR", "8"])


def test_a_folder_with_another_recipe_is_refused(recipe, tmp_path):
    def cfg(*overrides):
        return load_config(recipe, ["OUTPUT_DIR", str(tmp_path / "run"), *overrides])

    check_recipe(cfg())
    write_recipe(cfg())
    check_recipe(cfg())
    check_recipe(cfg("DATALOADER.NUM_WORKERS", "5", "MODEL.WEIGHTS", "elsewhere"))
    with pytest.raises(TableError, match=r"run has a run with SOLVER.MAX_ITER = 7, which is now 9"):
        check_recipe(cfg("SOLVER.MAX_ITER", "9"))


def test_a_run_is_finished_with_recipe_model_and_final_figures(tmp_path):
    cfg = load_config(overrides=["OUTPUT_DIR", str(tmp_path)])
    assert finished(tmp_path) is None
    write_recipe(cfg)
    write_results(tmp_path / "results.json", results_of(1, 70.0, stage="average"))
    assert finished(tmp_path) is None
    (tmp_path / FINAL).touch()
    assert finished(tmp_path) is None  # an average of an episode before the last
    write_results(tmp_path / "results.json", results_of(1, 70.0))
    assert finished(tmp_path).headline().metrics["top1"] == 70.0
