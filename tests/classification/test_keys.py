"""Keys of a method, loss, mixer or sampler that is not trained are refused by name."""

import re

import pytest

from ssod_imwa.classification.keys import SECTIONS
from ssod_imwa.classification.labelers.build import LABELERS
from ssod_imwa.classification.losses.build import LOSSES
from ssod_imwa.classification.methods.build import METHODS
from ssod_imwa.classification.mixers import MIXERS
from ssod_imwa.config.options import options_of
from ssod_imwa.config.reader import keys
from ssod_imwa.config.sections import options_by_key
from ssod_imwa.detection import keys as detection
from ssod_imwa.engine.checkpoint.packages import PIXEL_MEAN, PIXEL_STD
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config

WITH_LOSS = "CLS.ALGORITHM = 'erm' or 'fixmatch' or 'cossl' or 'mean_teacher'"
WIDE = "CLS.MODEL.NAME = 'wrn_28_2' or 'wrn_28_8'"
SUBSETS = "CLS.SAMPLER.NAME = 'balanced_subset'"
COSINE = "CLS.MODEL.CLASSIFIER = 'cosine' or 'biased_cosine'"
VITS = "CLS.MODEL.NAME = 'vit_base_patch16' or 'vit_tiny_patch4_32'"


LOSS_AND_MIX = [("loss", "LOSS.NAME"), ("loss", "LOSS.GAMMA"), ("mixer", "MIX.KIND")]
LOSS_AND_MIX += [("mixer", "MIX.BETA")]


def refusal(*settings):
    pairs = ["TASK", "classification", *map(str, settings)]
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=pairs)
    return str(caught.value).removeprefix("command line: ")


@pytest.mark.parametrize(
    ("chosen", "key", "value", "owner"),
    [
        ("CLS.ALGORITHM = 'ecl'", "CLS.LOSS.NAME", "ldam", WITH_LOSS),
        ("CLS.ALGORITHM = 'erm'", "CLS.LABELER.NAME", "daso", "CLS.ALGORITHM = 'fixmatch'"),
        ("CLS.MODEL.NAME = 'resnet50'", "CLS.MODEL.BN_MOMENTUM", 0.1, WIDE),
        ("CLS.ALGORITHM = 'gpaco'", "CLS.PACO.MOMENTUM", 0.9, "CLS.ALGORITHM = 'paco'"),
        ("CLS.ALGORITHM = 'bcl'", "CLS.MOCO.QUEUE", 8, "CLS.ALGORITHM = 'ncl' or 'ecl'"),
        ("CLS.LOSS.NAME = 'focal'", "CLS.LOSS.TAU", 2.0, "CLS.LOSS.NAME = 'balanced_softmax'"),
        ("CLS.MIX.KIND = 'mixup'", "CLS.MIX.BETA", 2.0, "CLS.MIX.KIND = 'mfw'"),
        ("CLS.SAMPLER.NAME = 'class'", "CLS.SAMPLER.PER_CLASS", 5, SUBSETS),
        ("CLS.SAMPLER.NAME = 'instance'", "CLS.MERGE", "greedy_h", SUBSETS),
        ("CLS.MODEL.CLASSIFIER = 'linear'", "CLS.MODEL.SCALE", 16.0, COSINE),
        ("CLS.MODEL.NAME = 'resnet50'", "CLS.STAGE.LAYER_DECAY", 0.75, VITS),
        ("CLS.MODEL.NAME = 'resnet50'", "CLS.MODEL.DROP_PATH", 0.1, VITS),
    ],
)
def test_a_key_without_a_meaning_is_named_with_what_it_belongs_to(chosen, key, value, owner):
    selector, _, name = chosen.partition(" = ")
    message = f"{key} has no meaning with {chosen} (it belongs to {owner})"
    assert refusal(selector, name.strip("'"), key, value) == message


ABOVE_0 = "has no meaning with {0} = 0.0 (it belongs to {0} above 0)"
RATIO, EPOCHS = ABOVE_0.format("CLS.IMBALANCE.RATIO"), ABOVE_0.format("CLS.SCHEDULE.EPOCHS")
WEIGHTS = (
    "has no meaning with CLS.LOSS.WEIGHTS = 'none' (it belongs to CLS.LOSS.WEIGHTS other than "
    "'none')"
)
SPLIT = (
    "has no meaning with CLS.IMBALANCE.SPLIT = 'first' (it belongs to CLS.IMBALANCE.SPLIT = 'cao' "
    "or 'pools')"
)
ECL, NCL = ("CLS.ALGORITHM", "ecl"), ("CLS.ALGORITHM", "ncl")
THINNED = ("CLS.IMBALANCE.RATIO", 9)


@pytest.mark.parametrize(
    ("settings", "key", "value", "reason"),
    [
        ((), "CLS.IMBALANCE.PROFILE", "step", RATIO),
        ((), "CLS.IMBALANCE.MAXIMUM", 500, RATIO),
        ((), "CLS.IMBALANCE.SPLIT", "first", RATIO),
        ((), "CLS.IMBALANCE.SEED", 1, RATIO),
        (
            ("CLS.IMBALANCE.RATIO", 9, "CLS.IMBALANCE.SPLIT", "first"),
            "CLS.IMBALANCE.SEED",
            1,
            SPLIT,
        ),
        ((), "CLS.SCHEDULE.STEPS", [3], EPOCHS),
        (("CLS.SCHEDULE.EPOCHS", 0), "CLS.SCHEDULE.WARMUP", 1, EPOCHS),
        ((), "CLS.LOSS.BETA", 0.9, WEIGHTS),
        (("CLS.LOSS.NAME", "ldam"), "CLS.LOSS.WEIGHTS_FROM", 0.8, WEIGHTS),
        ((*ECL, "CLS.ECL.BETA", 0), "CLS.MOCO.QUEUE", 8, ABOVE_0.format("CLS.ECL.BETA")),
        (
            (*NCL, "CLS.NCL.CONTRASTIVE_WEIGHT", 0),
            "CLS.MOCO.WIDTH",
            8,
            ABOVE_0.format("CLS.NCL.CONTRASTIVE_WEIGHT"),
        ),
    ],
)
def test_a_key_of_something_that_is_switched_off_is_refused(settings, key, value, reason):
    assert refusal(*settings, key, value) == f"{key} {reason}"


def test_keys_of_what_is_switched_on_are_in_the_tree():
    pairs = (
        *("TASK", "classification", "CLS.IMBALANCE.RATIO", 1, "CLS.IMBALANCE.SEED", 3),
        *("CLS.SCHEDULE.EPOCHS", "1e1", "CLS.SCHEDULE.STEPS", [5]),
        *("CLS.LOSS.WEIGHTS", "effective_number", "CLS.LOSS.BETA", 0.9),
    )
    cls = load_config(overrides=[*map(str, pairs)]).CLS
    assert (cls.IMBALANCE.SEED, cls.SCHEDULE.STEPS, cls.LOSS.BETA) == (3, [5.0], 0.9)
    ecl = load_config(overrides=["TASK", "classification", *ECL, "CLS.MOCO.QUEUE", "8"])
    assert ecl.CLS.MOCO.QUEUE == 8


RECIPE = """
TASK: classification
CLS:
  SCHEDULE: {EPOCHS: 5, WARMUP: 1}
  IMBALANCE: {RATIO: 10, SEED: 1}
  LOSS: {WEIGHTS: effective_number, BETA: 0.9}
"""


@pytest.mark.parametrize(
    ("switch", "off", "detail"),
    [
        ("CLS.SCHEDULE.EPOCHS", "0", "CLS.SCHEDULE.WARMUP"),
        ("CLS.IMBALANCE.RATIO", "0", "CLS.IMBALANCE.SEED"),
        ("CLS.LOSS.WEIGHTS", "none", "CLS.LOSS.BETA"),
    ],
)
def test_the_command_line_switches_off_what_a_file_details(switch, off, detail, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    assert detail in keys(load_config(file))
    assert detail not in keys(load_config(file, [switch, off]))
    # A detail beside the switch was never of use.
    with pytest.raises(ConfigError, match=rf"^command line: {detail} has no meaning with {switch}"):
        load_config(file, [detail, "0.5" if "LOSS" in detail else "1", switch, off])


def own_keys(prefix, options):
    return {f"{prefix}.{name}": item.default for name, item in options_of(options).items()}


def combinations(prefix, key, options):
    """(name, key of another, its default, the names that have it)."""
    having = {}
    for name, kind in options.items():
        for other in own_keys(prefix(name), kind):
            having.setdefault(other, []).append(name)
    for name in options:
        for other, names in having.items():
            if name not in names:
                yield pytest.param(key, name, other, names, id=f"{name} {other}")


OF_METHODS = combinations(
    lambda name: METHODS[name].prefix,
    "CLS.ALGORITHM",
    {name: entry.options for name, entry in METHODS.items()},
)
OF_LABELERS = combinations(
    lambda name: "CLS.LABELER",
    "CLS.LABELER.NAME",
    {name: labeler.options_class for name, labeler in LABELERS.items()},
)
OF_LOSSES = combinations(
    lambda name: "CLS.LOSS",
    "CLS.LOSS.NAME",
    {name: loss.options_class for name, loss in LOSSES.items()},
)
OF_MIXERS = combinations(
    lambda name: "CLS.MIX",
    "CLS.MIX.KIND",
    {name: mixer.options_class for name, mixer in MIXERS.items()},
)


@pytest.mark.parametrize(
    ("key", "name", "other", "names"), [*OF_METHODS, *OF_LOSSES, *OF_MIXERS, *OF_LABELERS]
)
def test_keys_of_other_methods_losses_and_mixers_are_refused(key, name, other, names):
    default = options_by_key(SECTIONS)[other].default
    belongs = " or ".join(map(repr, names))
    expected = f"{other} has no meaning with {key} = {name!r} (it belongs to {key} = {belongs})"
    algorithm = ("CLS.ALGORITHM", "fixmatch") if key == "CLS.LABELER.NAME" else ()
    assert refusal(*algorithm, key, name, other, default) == expected


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, f"CLS.{group}")
        for name, entry in METHODS.items()
        for share, group in LOSS_AND_MIX
        if share not in entry.shares
    ],
)
def test_losses_and_mixers_belong_to_the_method_that_reads_them(name, key):
    default = options_by_key(SECTIONS)[key].default
    assert f"{key} has no meaning with CLS.ALGORITHM = {name!r}" in refusal(
        "CLS.ALGORITHM", name, key, default
    )


@pytest.mark.parametrize("key", sorted(options_by_key(SECTIONS)))
def test_no_key_of_classification_belongs_to_detection(key):
    if key in options_by_key(detection.SECTIONS):  # both tasks have weights and unlabeled images
        return
    value = options_by_key(SECTIONS)[key].default
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} has no meaning with TASK = 'det"):
        load_config(overrides=[key, str(value)])


def test_the_pixels_of_the_lite_networks_are_their_weights():
    settings = ["TASK", "classification", "CLS.MODEL.NAME"]
    lite = load_config(overrides=[*settings, "timm:tf_efficientnet_lite0"]).MODEL
    assert (lite.PIXEL_MEAN, lite.PIXEL_STD) == (PIXEL_MEAN, PIXEL_STD)
    other = load_config(overrides=[*settings, "timm:resnet18"]).MODEL
    assert other.PIXEL_MEAN == [123.675, 116.28, 103.53]


def test_details_of_views_belong_to_the_views_that_have_them():
    assert refusal("CLS.INPUT.CUTOUT", 8) == (
        "CLS.INPUT.CUTOUT has no meaning with CLS.INPUT.VIEWS = ['plain'] (it belongs to "
        "CLS.INPUT.VIEWS that hold 'randaugment')"
    )
    assert "CLS.INPUT.PADDING has no meaning" in refusal(
        "CLS.INPUT.VIEWS", ["standard"], "CLS.INPUT.PADDING", 8
    )
    fixmatch = ["TASK", "classification", "CLS.ALGORITHM", "fixmatch"]
    cfg = load_config(overrides=[*fixmatch, "CLS.INPUT.CUTOUT", "8", "CLS.INPUT.PADDING", "2"])
    assert (cfg.CLS.INPUT.CUTOUT, cfg.CLS.INPUT.PADDING) == (8, 2)
