from pathlib import Path

import pytest
import yaml

from ssod_imwa.config import load_config
from ssod_imwa.papers.reproduction import run_config
from ssod_imwa.papers.tables import needed_runs, read_table

CONFIGS = Path(__file__).parents[2] / "configs"
TABLES = sorted((CONFIGS / "tables").glob("*.yaml"))
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(TABLES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_loads_and_opens_by_saying_what_it_is(path):
    if "detectron2" in path.stem:
        pytest.importorskip("detectron2", reason="detectron2 is not installed (docs/detectron2.md)")
    load_config(path)
    assert path.read_text().startswith("# ")


def test_no_two_recipes_write_to_the_same_folder():
    folders = {}
    for path in FILES:
        tree = yaml.safe_load(path.read_text())
        if "OUTPUT_DIR" in tree:
            folders.setdefault(tree["OUTPUT_DIR"], []).append(path.name)
    assert all(len(names) == 1 for names in folders.values()), folders


@pytest.mark.parametrize("folder", ["digits", "bccd"])
@pytest.mark.parametrize("suffix", ["", "_mwa", "_imwa"])
def test_variants_train_as_their_base_but_for_imwa(folder, suffix):
    base = load_config(CONFIGS / folder / "unbiased_teacher.yaml").clone()
    variant = load_config(CONFIGS / folder / f"unbiased_teacher{suffix}.yaml").clone()
    for cfg in (base, variant):
        cfg.defrost()
        del cfg["IMWA"], cfg["OUTPUT_DIR"], cfg["TEST"]
    assert base == variant


CLASSIFICATION = ("digit_images", "cifar10_lt", "cifar100_lt", "imagenet_lt", "places_lt")


@pytest.mark.parametrize("folder", [*CLASSIFICATION, "inaturalist18"])
def test_averaging_variants_of_classifiers_train_as_their_base(folder):
    variants = [p for p in FILES if p.parent.name == folder and p.stem.endswith(("wa", "ema"))]
    assert variants
    for path in variants:
        name = path.stem.removesuffix("_ema").removesuffix("_imwa").removesuffix("_mwa")
        base, variant = (load_config(p).clone() for p in (path.with_name(f"{name}.yaml"), path))
        for cfg in (base, variant):
            cfg.defrost()
            del cfg["IMWA"], cfg["OUTPUT_DIR"], cfg.CLS["EMA_DECAY"]
        assert base == variant, path


def test_twice_the_iterations_match_the_steps_of_two_members():
    for path in CONFIGS.rglob("*_2x*.yaml"):
        control = load_config(path)
        imwa = load_config(path.with_name(path.name.replace("_2x", "_imwa")))
        assert duration(control) == duration(imwa) * imwa.IMWA.MEMBERS, path


def duration(cfg):
    return cfg.CLS.SCHEDULE.EPOCHS or cfg.SOLVER.MAX_ITER


def test_a_later_stage_starts_from_the_folder_of_a_recipe():
    trees = {path: yaml.safe_load(path.read_text()) for path in FILES}
    folders = {tree.get("OUTPUT_DIR") for tree in trees.values()}
    starts = {path: tree.get("MODEL", {}).get("WEIGHTS", "") for path, tree in trees.items()}
    stages = {path: start for path, start in starts.items() if start.startswith("output/")}
    assert len(stages) > 10
    assert not {path: start for path, start in stages.items() if start not in folders}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_names_recipes_that_load_and_opens_by_saying_what_it_is(path):
    """`read_table` checks names, metrics and that a paper's numbers are numbers with a source."""
    table = read_table(path)
    for run in table.runs.values():
        initial = Path("first") if run.after else None
        cfg = run_config(table, run, seed=1, output=Path("out"), initial=initial)
        # A stage that needs another has to get it from the table, not from the recipe's folder.
        assert not cfg.MODEL.WEIGHTS.startswith("output/"), run.name
    assert {run.name for run in needed_runs(table, table.rows)} == set(table.runs)
    assert path.read_text().startswith("# ")


def test_there_are_tables():
    assert len(TABLES) > 20
