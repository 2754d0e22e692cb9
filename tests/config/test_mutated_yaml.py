"""Mutated YAML of both tasks and of tables: each is read, or refused in one line with its file."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import both_profiles, damaged, limited_memory, outcome, trees

from ssod_imwa.config.reader import keys, value_of
from ssod_imwa.papers.tables import read_table
from ssod_imwa.runs.config import load_config

DETECTION = {
    "_BASE_": ["base.yaml"],
    "SEED": 3,
    "MODEL": {"RESNETS": {"DEPTH": 18, "NORM": "BN"}, "ANCHOR_GENERATOR": {"SIZES": [[8, 9]]}},
    "INPUT": {"MIN_SIZE_TRAIN": [24, 32], "RANDOM_FLIP": "none", "STRONG": {"GRAYSCALE": 0.2}},
    "DATASETS": {"TRAIN": ["bccd_train"], "TEST": ["bccd_test"], "SPLIT": {"PERCENT": 10.0}},
    "SSOD": {"ALGORITHM": "unbiased_teacher", "BURN_IN_ITERS": 5, "EMA_DECAY": 0.9},
    "SOLVER": {"STEPS": "(3, 4)", "BASE_LR": "1e-3", "AMP": {"ENABLED": True}},
}
CLASSIFICATION = {
    "_BASE_": "base.yaml",
    "TASK": "classification",
    "CLS": {
        "ALGORITHM": "erm",
        "MODEL": {"NAME": "cifar_resnet20"},
        "LOSS": {"NAME": "focal", "GAMMA": 1},
        "SCHEDULE": {"EPOCHS": 2},
        "INPUT": {"VIEWS": ["plain"]},
    },
    "IMWA": {"MEMBERS": 2, "COEFFICIENTS": [0.5, 0.5]},
}
TABLE = {
    "title": "T",
    "metrics": ["top1"],
    "overrides": {"SEED": 1},
    "runs": {"a": {"config": "base.yaml"}, "b": {"config": ["base.yaml"], "after": "a"}},
    "rows": [
        {"label": "A", "run": "a", "paper": {"top1": 7.5}, "source": "S"},
        {"label": "B", "run": "b", "against": "A", "member": 1},
    ],
}


@pytest.fixture(autouse=True)
def memory():
    with limited_memory():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "base.yaml").write_text("LOG_PERIOD: 5\n")
    return folder


def as_yaml(tree):
    # Halves of characters, which no file holds, are written as YAML escapes them.
    return yaml.safe_dump(tree, allow_unicode=False).encode()


def has_values_of_its_types(cfg, defaults):
    for key in keys(cfg):
        value = value_of(cfg, key)
        for item in value if isinstance(value, list) else [value]:
            assert not isinstance(item, float) or math.isfinite(item), key
            assert not isinstance(item, int) or abs(item) < 2**64, key
        assert type(value) is type(value_of(defaults, key)), key


@both_profiles
@pytest.mark.parametrize("tree", [DETECTION, CLASSIFICATION], ids=["detection", "classification"])
def test_configurations(folder, profile, tree):
    file = folder / "zebra.yaml"
    file.write_bytes(as_yaml(tree))
    whole = load_config(file)

    @profile
    @given(trees(tree).map(as_yaml).flatmap(damaged))
    def each(content):
        file.write_bytes(content)
        cfg = outcome(lambda: load_config(file), "zebra.yaml")
        if cfg is not None and set(keys(cfg)) == set(keys(whole)):
            has_values_of_its_types(cfg, whole)

    each()


@both_profiles
def test_tables(folder, profile):
    @profile
    @given(trees(TABLE).map(as_yaml).flatmap(damaged))
    def each(content):
        (folder / "zebra.yaml").write_bytes(content)
        table = outcome(lambda: read_table(folder / "zebra.yaml"), "zebra.yaml")
        assert table is None or (table.runs and table.rows)

    each()


@both_profiles
def test_texts_made_of_what_yaml_has(folder, profile):
    words = "a SEED : - [ ] { } &a *a <<: ? | ' # --- ... ~ .inf 2026-99-99 0x 1_ base.yaml"
    tags = "!!int !!float !!bool !!timestamp !!binary !!set !!x"
    pieces = [*words.split(), *(f"{tag} " for tag in tags.split())]
    pieces += [
        "\n",
        "  ",
        ": ",
        '"',
        "\\x00",
        "%YAML 1.1",
        "zebra.yaml",
        "\ufeff",
        "\x85",
        "9" * 25,
    ]
    pieces += ["_BASE_: ", "SOLVER: ", "STEPS: "]

    @profile
    @given(st.lists(st.sampled_from(pieces), max_size=9).map("".join))
    def each(text):
        (folder / "zebra.yaml").write_bytes(text.encode())
        outcome(lambda: load_config(folder / "zebra.yaml"), "zebra.yaml")

    each()
