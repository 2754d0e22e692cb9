import functools
from pathlib import Path

import pytest
import yaml

from ssod_imwa.config.naming import output_folder
from ssod_imwa.papers.reproduction import run_config
from ssod_imwa.papers.tables import needed_runs, read_table
from ssod_imwa.runs.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TABLES = sorted((CONFIGS / "tables").glob("*.yaml"))
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(TABLES))


def read(*names):
    """The configuration of files below configs/, without .yaml."""
    return load_config([CONFIGS / f"{name}.yaml" for name in names])


@functools.cache
def chain(path):
    """A file and all that it stands on by `_BASE_`."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    names = [bases] if isinstance(bases, str) else bases
    return {path}.union(*(chain((path.parent / name).resolve()) for name in names))


# What recipes stand on: data and schedule with a two-stage detector or with FCOS.
BASES = ("base", "fcos_base")
RECIPES = [path for path in FILES if any(file.stem in BASES for file in chain(path))]
# What neither a recipe stands on nor a table names.
OTHERS = [
    ("digits/unbiased_teacher_imwa", "models/detectron2_r18"),
    ("digits/unbiased_teacher_imwa", "models/detectron2_r18_as_torchvision"),
    ("coco/unbiased_teacher", "coco/10pct", "models/faster_rcnn_r101_fpn"),
    ("coco/dense_teacher", "coco/10pct", "models/retinanet_r50_fpn"),
    ("digits/retinanet_supervised",),
    ("digits/dense_teacher", "digits/imwa"),
    ("voc/soft_teacher", "schedules/soft_teacher_2x"),
    ("voc_mini/unbiased_teacher", "voc_mini/imwa"),
    ("voc_mini/unbiased_teacher", "voc_mini/2x"),
    ("cifar10_lt/cross_entropy", "methods/manifold_mixup"),
    ("cifar10_lt/cross_entropy", "averaging/late"),
    ("cifar10_lt/cross_entropy", "averaging/imwa", "averaging/lawa"),
    ("places_lt/cross_entropy", "methods/btm_classifier"),
    ("cifar10_lt_semi/daso_mismatched", "cifar10_lt_semi/uniform"),
    ("cifar10_lt_semi/acr", "cifar10_lt_semi/reversed", "averaging/imwa"),
    ("cifar10_lt_semi/abc_daso", "cifar10_lt_semi/n1500", "cifar10_lt_semi/ratio150"),
    ("cifar10_lt_semi/darp_la", "cifar10_lt_semi/real_images"),
    ("cifar10_lt_semi/darp", "cifar10_lt_semi/darp_uniform"),
    ("cifar10_lt_semi/darp", "cifar10_lt_semi/darp_reversed"),
    ("cifar10_lt_semi/darp_la", "cifar10_lt_semi/darp_uniform_n1500"),
    ("cifar10_lt_semi/darp_la", "cifar10_lt_semi/darp_reversed_n1500"),
    ("digit_images_semi/daso", "digit_images_semi/imwa"),
    ("cifar10_lt_features/cross_entropy", "cifar10_lt_features/hold_out"),
    (
        "cifar10_lt_features/acr",
        "cifar10_lt_features/hold_out_semi",
        "cifar10_lt_features/hold_out_unlabeled",
    ),
    ("cifar10_lt_maps/cross_entropy", "cifar10_lt_maps/hold_out"),
    ("cifar100_lt_semi/daso", "cifar100_lt_semi/n150", "cifar100_lt_semi/ratio20"),
    ("cifar100_lt_semi/acr_wide", "cifar10_lt_semi/reversed"),
    ("stl10_lt_semi/daso", "stl10_lt_semi/n450", "stl10_lt_semi/ratio20"),
    ("imagenet127/acr", "imagenet127/size64", "averaging/imwa"),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_loads(path):
    load_config(path)


@pytest.mark.parametrize("names", OTHERS, ids="+".join)
def test_compositions_that_no_table_has_load(names):
    if any("detectron2" in name for name in names):
        pytest.importorskip("detectron2", reason="detectron2 is not installed (docs/detectron2.md)")
    read(*names)


def test_every_file_is_of_some_recipe_and_opens_by_saying_what_it_is():
    """A fragment alone is no configuration: which keys mean anything is up to the method."""
    composed = [
        path.resolve() for t in TABLES for r in read_table(t).runs.values() for path in r.config
    ]
    composed += [CONFIGS / f"{name}.yaml" for names in OTHERS for name in names]
    assert set().union(*map(chain, [*RECIPES, *composed])) == set(FILES)
    assert all(path.read_text().startswith("# ") for path in FILES)


def test_recipes_leave_their_output_folder_to_their_names():
    assert not [path for path in FILES if "OUTPUT_DIR" in yaml.safe_load(path.read_text())]
    folders = [output_folder([path]) for path in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("folder", ["digits", "bccd", "voc_mini"])
def test_a_file_for_method_and_average_is_the_two_files(folder):
    path = CONFIGS / folder / "unbiased_teacher_imwa.yaml"
    if path.exists():
        assert load_config(path) == read(f"{folder}/unbiased_teacher", f"{folder}/imwa")


FRAGMENTS = [
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in FILES
    if path.stem in ("imwa", "mwa", "ema", "ema_slow", "late", "lawa")
]
METHODS = {
    "digits": "unbiased_teacher",
    "bccd": "unbiased_teacher",
    "voc_mini": "unbiased_teacher",
    "digit_images": "cross_entropy",
    "digit_images_semi": "fixmatch",
    "cifar10_lt_features": "cross_entropy",
    "cifar10_lt_semi_small": "fixmatch",
    "averaging": "cross_entropy",
}


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_averaging_changes_nothing_else(fragment):
    folder = fragment.partition("/")[0]
    method = f"{'cifar10_lt' if folder == 'averaging' else folder}/{METHODS[folder]}"
    plain, averaged = read(method).clone(), read(method, fragment).clone()
    assert plain.dump() != averaged.dump()
    for cfg in (plain, averaged):
        cfg.defrost()
        del cfg["IMWA"], cfg["OUTPUT_DIR"]
        if cfg.TASK == "classification":
            del cfg.CLS["EMA_DECAY"]
        del cfg.TEST["EVAL_EPISODES"], cfg.TEST["EVAL_MEMBERS"]
    assert plain == averaged


@pytest.mark.parametrize(
    ("recipe", "twice"),
    [
        ("digits/unbiased_teacher", "digits/2x"),
        ("digits/mean_teacher", "digits/2x"),
        ("coco/dense_teacher", "coco/2x"),
        ("voc/dense_teacher", "voc/2x"),
        ("bccd/unbiased_teacher", "bccd/2x"),
        ("voc/unbiased_teacher", "voc/2x"),
        ("voc_mini/unbiased_teacher", "voc_mini/2x"),
        ("coco/unbiased_teacher", "coco/2x"),
        ("coco/unbiased_teacher_full", "coco/full_2x"),
        ("coco/soft_teacher", "schedules/soft_teacher_2x"),
        ("voc/soft_teacher", "schedules/soft_teacher_2x"),
        ("digit_images/cross_entropy", "digit_images/2x"),
        ("cifar10_lt/cross_entropy", "cifar10_lt/2x"),
        ("cifar10_lt/bcl", "cifar10_lt/2x"),
        ("cifar10_lt_semi_small/acr", "cifar10_lt_semi_small/2x"),
        ("cifar100_lt/cross_entropy", "cifar100_lt/2x"),
        ("cifar100_lt/bcl", "cifar100_lt/2x"),
    ],
)
def test_twice_the_iterations_match_the_steps_of_two_members(recipe, twice):
    imwa = read(recipe, "averaging/imwa")
    assert duration(read(recipe, twice)) == duration(imwa) * imwa.IMWA.MEMBERS


def duration(cfg):
    epochs = cfg.CLS.SCHEDULE.EPOCHS if cfg.TASK == "classification" else 0
    return epochs or cfg.SOLVER.MAX_ITER


def test_a_later_stage_starts_from_the_folder_of_a_recipe():
    folders = {output_folder([path]) for path in FILES}
    trees = {path: yaml.safe_load(path.read_text()) for path in FILES}
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
