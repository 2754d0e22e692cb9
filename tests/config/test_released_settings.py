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
            "inaturalist18/btm_stage4",
            "places_lt/btm_stage4",
            "places_lt/mislas_gml",
            "places_lt/mislas_stage2",
        )
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
