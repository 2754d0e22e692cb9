"""Detectors from configurations."""

import pytest
from support import final_weights

from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.packages import PIXEL_MEAN, PIXEL_STD
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import train

LITE = [
    *("MODEL.BACKBONE.NAME", "timm:tf_efficientnet_lite0", "MODEL.BACKBONE.FREEZE_AT", "6"),
    *("MODEL.FPN.LEVELS", "[3, 4, 5]", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128]]"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
]


def test_the_pixels_of_the_lite_networks_are_their_weights():
    detector = build_detector(load_config(overrides=LITE), 3)
    assert detector.pixel_mean.flatten().tolist() == PIXEL_MEAN
    assert detector.pixel_std.flatten().tolist() == PIXEL_STD
    other = load_config(overrides=["MODEL.BACKBONE.NAME", "timm:resnet18"])
    assert other.MODEL.PIXEL_MEAN == load_config().MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]


def test_pixels_that_a_run_sets_stay():
    cfg = load_config(overrides=[*LITE, "MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]"])
    assert build_detector(cfg, 3).pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BACKBONE.NAME", "resnet50"], "must be 'resnet' or 'timm:NAME'"),
        (["MODEL.BACKBONE.NAME", "timm:resnet_fifty"], "has no such network"),
        (["MODEL.BACKBONE.FREEZE_AT", "6"], r"must be 0\.\.5"),
        (["MODEL.FPN.LEVELS", "[2, 3, 4, 6]"], "must be one after the other"),
        (["MODEL.FPN.LEVELS", "[3, 4, 5, 6]"], "must be among 2, 3, 4, 5"),
        (["MODEL.FPN.LEVELS", "[3, 4]"], "for each of 3 levels"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_detector(load_config(overrides=overrides), 3)


def test_keys_of_the_other_kind_of_network_are_refused():
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.DEPTH has no meaning with"):
        load_config(overrides=[*LITE, "MODEL.RESNETS.DEPTH", "18"])
    with pytest.raises(ConfigError, match=r"MODEL\.BACKBONE\.NORM has no meaning with"):
        load_config(overrides=["MODEL.BACKBONE.NORM", "BN"])


SHORT = [
    *("MODEL.BACKBONE.NAME", "timm:tf_efficientnet_lite0", "MODEL.BACKBONE.FREEZE_AT", 4),
    *("MODEL.FPN.LEVELS", [3, 4], "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
    *("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "SOLVER.OPTIMIZER", "AdamW"),
]


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_body_learns_at_its_own_rate_and_frozen_stages_not_at_all(detection_config, factor):
    cfg = detection_config(*SHORT, "MODEL.BACKBONE.LR_FACTOR", factor)
    train(cfg)
    trained = final_weights(cfg)
    seed_everything(cfg.SEED, "initial weights")
    initial = build_detector(cfg, 2).state_dict()
    moved = {name for name, x in initial.items() if not x.equal(trained[f"student.{name}"])}
    body = {name for name in moved if name.startswith("backbone.body.")}
    # The stem and blocks 0 to 2 are frozen, and all batch norms.
    assert {".".join(name.split(".")[2:4]) for name in body} == (
        {"blocks.3", "blocks.4"} if factor else set()
    )
    assert all(name.endswith("weight") and "bn" not in name for name in body)
    assert {name for name in initial if "backbone.fpn." in name} <= moved
