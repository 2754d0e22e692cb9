"""Recipes have the settings that the methods' public codes and papers were found to have."""

from pathlib import Path

import pytest

from ssod_imwa.config.reader import value_of
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def settings(recipe, keys):
    cfg = load_config(CONFIGS / f"{recipe}.yaml")
    return {key: value_of(cfg, key) for key in keys}


RELEASED = {
    # NCL: Nesterov everywhere, its own cosines on large sets, all of ResNet-152 on Places-LT.
    "cifar100_lt/ncl": {"SOLVER.NESTEROV": True, "CLS.MODEL.CLASSIFIER": "linear"},
    "imagenet_lt/ncl": {
        "SOLVER.NESTEROV": True,
        "CLS.MODEL.CLASSIFIER": "biased_cosine",
        "CLS.MODEL.SCALE": 16.0,
    },
    "inaturalist18/ncl": {
        "SOLVER.NESTEROV": True,
        "CLS.MODEL.CLASSIFIER": "biased_cosine",
        "CLS.MODEL.SCALE": 32.0,
    },
    "places_lt/ncl": {
        "SOLVER.NESTEROV": True,
        "SOLVER.WEIGHT_DECAY": 2e-4,
        "SOLVER.WARMUP_FACTOR": 0.333,
        "CLS.SCHEDULE.WARMUP": 5,
        "CLS.MODEL.CLASSIFIER": "biased_cosine",
        "CLS.MODEL.SCALE": 16.0,
        "CLS.INPUT.VIEWS": ["sim", "sim"],
        "CLS.STAGE.PART": "all",
        "CLS.STAGE.RESET_LAST_BLOCK": False,
        "MODEL.WEIGHTS": "imagenet",
    },
    # Views of large images.
    **{
        f"{data}/bcl": {"CLS.INPUT.VIEWS": ["randcls", "bcl_sim", "bcl_sim"]}
        for data in ("imagenet_lt", "inaturalist18")
    },
    "imagenet_lt/livt": {
        "CLS.INPUT.TEST_RESIZE": "bicubic",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupThenCosineLR",
    },
    # PaCo and GPaCo: when CIFAR's rate falls, and what of ResNet-152 is trained on Places-LT.
    "cifar100_lt/paco": {"CLS.SCHEDULE.STEPS": [321, 361]},
    **{
        f"places_lt/{method}": {
            "SOLVER.LR_SCHEDULER_NAME": "WarmupThenCosineLR",
            "CLS.SCHEDULE.WARMUP": 5,
            "CLS.STAGE.PART": "last_block_and_norms",
            "CLS.STAGE.RESET_LAST_BLOCK": False,
            "MODEL.WEIGHTS": "imagenet",
        }
        for method in ("paco", "gpaco")
    },
    # Second stages draw four images of a class at a time.
    **{
        recipe: {"CLS.SAMPLER.NAME": "class", "CLS.SAMPLER.PER_DRAW": 4}
        for recipe in (
            "cifar10_lt/crt",
            "cifar10_lt/mislas_stage2",
            "cifar100_lt/mislas_stage2",
            "digit_images/mislas_gml",
            "imagenet_lt/btm_stage4",
            "imagenet_lt/mislas_stage2",
            "imagenet_lt/paco_gml",
            "inaturalist18/btm_stage4",
            "inaturalist18/crt",
            "places_lt/btm_stage4",
            "tiered_imagenet/crt",
            "places_lt/mislas_gml",
            "places_lt/mislas_stage2",
        )
    },
    # PaCo with ResNeXt-50, and BTM's rates after PaCo and GPaCo.
    "imagenet_lt/paco_resnext50": {
        "CLS.MODEL.NAME": "resnext50_32x4d",
        "CLS.PACO.TEMPERATURE": 0.07,
        "CLS.INPUT.VIEWS": ["randclsstack", "sim"],
    },
    "imagenet_lt/paco_classifier": {"SOLVER.BASE_LR": 0.1, "CLS.STAGE.PART": "classifier"},
    "imagenet_lt/paco_btm": {"SOLVER.BASE_LR": 1e-5, "CLS.SCHEDULE.EPOCHS": 30},
    "imagenet_lt/paco_btm_stage4": {"CLS.SCHEDULE.EPOCHS": 40, "CLS.SAMPLER.PER_DRAW": 4},
    "places_lt/gpaco_btm": {"SOLVER.BASE_LR": 1e-3, "CLS.SCHEDULE.EPOCHS": 30},
    "places_lt/gpaco_btm_stage4": {"CLS.SCHEDULE.EPOCHS": 40, "CLS.SAMPLER.PER_DRAW": 4},
    # MFW's Tiered-ImageNet stands on MetaOptNet's code.
    "tiered_imagenet/mfw": {
        "SOLVER.NESTEROV": True,
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.WEIGHT_DECAY": 5e-4,
        "CLS.MODEL.NAME": "resnet12",
        "CLS.INPUT.PADDING": 8,
        "CLS.MIX.BETA": 0.01,
    },
    # The cosine begins where the warm-up ends.
    **{
        f"{data}/{method}": {"SOLVER.LR_SCHEDULER_NAME": "WarmupThenCosineLR"}
        for data in ("imagenet_lt", "inaturalist18", "places_lt")
        for method in ("livt_mae", "livt", "paco", "gpaco")
        if f"{data}/{method}" not in ("imagenet_lt/livt", "places_lt/paco", "places_lt/gpaco")
    },
}


@pytest.mark.parametrize("recipe", RELEASED)
def test_a_recipe_is_the_released_one(recipe):
    assert settings(recipe, RELEASED[recipe]) == RELEASED[recipe]


def test_nesterov_belongs_to_sgd_with_momentum():
    with pytest.raises(ConfigError, match=r"SOLVER.NESTEROV has no meaning with SOLVER.OPTIMIZER"):
        load_config(overrides=["SOLVER.OPTIMIZER", "AdamW", "SOLVER.NESTEROV", "True"])
    with pytest.raises(ConfigError, match=r"NESTEROV = True is not allowed with SOLVER.MOMENTUM"):
        load_config(overrides=["SOLVER.MOMENTUM", "0.0", "SOLVER.NESTEROV", "True"])


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("digit_images_semi/fixmatch", ["SOLVER.OPTIMIZER", "AdamW"]),
        # Also what the keys that are taken away chose: the labeler of FixMatch, and its own keys.
        ("digit_images_semi/daso", ["CLS.ALGORITHM", "mean_teacher"]),
        ("digits/unbiased_teacher_imwa", ["SSOD.ALGORITHM", "supervised"]),
    ],
)
def test_a_recipes_choice_can_be_changed_on_the_command_line(recipe, changes):
    cfg = load_config(CONFIGS / f"{recipe}.yaml", changes)
    assert value_of(cfg, changes[0]) == changes[1]
