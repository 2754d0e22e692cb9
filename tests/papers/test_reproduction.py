import math
from pathlib import Path

import pytest

from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.errors import ConfigError
from ssod_imwa.papers.reproduction import (
    check_recipe,
    finished,
    run_config,
    scaled,
    write_recipe,
)
from ssod_imwa.papers.tables import Run, TableError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.generations import all_generations
from ssod_imwa.runs.results import write_results


def test_scaling_shortens_everything_that_counts_iterations():
    cfg = load_config(
        overrides=[
            *("SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "[600, 800]", "SOLVER.WARMUP_ITERS", "40"),
            *("SSOD.ALGORITHM", "unbiased_teacher", "SSOD.BURN_IN_ITERS", "300"),
            *("IMWA.EPISODES", "20"),
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


def test_scaling_leaves_a_warm_up_that_there_was():
    cfg = load_config(overrides=["SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "10"])
    assert scaled(cfg, 0.01).SOLVER.WARMUP_ITERS == 1
    never = load_config(overrides=["SOLVER.WARMUP_ITERS", "0"])
    assert scaled(never, 0.01).SOLVER.WARMUP_ITERS == 0


def test_scaling_leaves_generations_equally_long():
    recipes = Path(__file__).parents[2] / "configs"
    cfg = load_config(recipes / "imagenet127/crest_plus.yaml")
    assert cfg.SOLVER.MAX_ITER == 249_999
    shorter = scaled(cfg, 0.05)  # 12,499.95
    assert shorter.SOLVER.MAX_ITER == 12_501
    assert [run.SOLVER.MAX_ITER for run in all_generations(shorter)] == [4167] * 3
    assert scaled(cfg, 1e-9).SOLVER.MAX_ITER == 3


def test_scaling_refuses_factors_that_make_no_sense():
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"must be above 0"):
            scaled(load_config(), factor)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("SEED: 9\nSOLVER: {MAX_ITER: 7}\nMODEL: {WEIGHTS: imagenet}\n")
    return path


def test_overrides_come_in_order_table_run_command_line(recipe, tmp_path, table_of):
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


@pytest.mark.parametrize("key", ["SEED", "OUTPUT_DIR", "MODEL.WEIGHTS"])
def test_what_each_run_has_of_its_own_is_not_overridden(recipe, tmp_path, table_of, key):
    run = Run("r", (recipe,), ())
    places = {"seed": 4, "output": tmp_path, "initial": tmp_path / "first"}
    with pytest.raises(ConfigError, match=f"{key} is not allowed here"):
        run_config(table_of(runs=[run]), run, **places, overrides=[key, "5"])


def test_a_wrong_override_is_blamed_on_who_wrote_it(recipe, tmp_path, table_of):
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


def test_a_run_is_finished_with_recipe_model_and_final_figures(tmp_path, results_of):
    cfg = load_config(overrides=["OUTPUT_DIR", str(tmp_path)])
    assert finished(tmp_path) is None
    write_recipe(cfg)
    write_results(tmp_path / "results.json", results_of(1, 70.0, stage="average"))
    assert finished(tmp_path) is None
    (tmp_path / FINAL).touch()
    assert finished(tmp_path) is None  # an average of an episode before the last
    write_results(tmp_path / "results.json", results_of(1, 70.0))
    assert finished(tmp_path).headline().metrics["top1"] == 70.0
