from pathlib import Path

import pytest
import yaml

from ssod_imwa.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


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


def test_twice_the_iterations_match_the_steps_of_two_members():
    for path in CONFIGS.rglob("*_2x*.yaml"):
        control = load_config(path)
        imwa = load_config(path.with_name(path.name.replace("_2x", "_imwa")))
        assert control.SOLVER.MAX_ITER == imwa.SOLVER.MAX_ITER * imwa.IMWA.MEMBERS, path
