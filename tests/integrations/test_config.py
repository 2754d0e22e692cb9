"""One configuration for both packages."""

import pytest

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config, member_configs, parse_config

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

FASTER_RCNN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


def with_detectron2(*overrides):
    return load_config(
        overrides=[
            "MODEL.TOOLKIT",
            "detectron2",
            "MODEL.DETECTRON2.CONFIG",
            FASTER_RCNN,
            *overrides,
        ]
    )


def test_our_keys_join_detectron2s_and_change_none_of_its_own():
    from detectron2.config import get_cfg

    from ssod_imwa.integrations.detectron2 import add_ssod_imwa_config

    cfg, stock = get_cfg(), get_cfg()
    add_ssod_imwa_config(cfg)
    assert (cfg.IMWA.MEMBERS, cfg.SSOD.ALGORITHM) == (1, "supervised")
    cfg.merge_from_list(["IMWA.MEMBERS", "2", "SOLVER.MAX_ITER", "60"])
    assert cfg.IMWA.MEMBERS == 2
    assert cfg.SOLVER.BASE_LR == stock.SOLVER.BASE_LR
    assert cfg.MODEL.RPN == stock.MODEL.RPN


def test_the_zoo_describes_the_detector_and_we_the_training():
    cfg = with_detectron2()
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    assert cfg.INPUT.FORMAT == "BGR"
    ours = load_config()
    assert (cfg.SOLVER.MAX_ITER, cfg.SEED) == (ours.SOLVER.MAX_ITER, ours.SEED)
    assert cfg.MODEL.DEVICE == "auto"


def test_a_method_of_ours_changes_a_detector_of_theirs():
    cfg = with_detectron2(
        "MODEL.ROI_HEADS.LOSS", "FocalLoss", "MODEL.RPN.POSITIVE_FRACTION", "0.25"
    )
    assert cfg.MODEL.ROI_HEADS.LOSS == "FocalLoss"
    assert cfg.MODEL.RPN.POSITIVE_FRACTION == 0.25
    assert with_detectron2("MODEL.RESNETS.DEPTH", "34").MODEL.RESNETS.DEPTH == 34


def test_members_differ_in_our_keys_alone():
    overrides = ["IMWA.MEMBERS", "2", "IMWA.MEMBER_OVERRIDES"]
    cfg = with_detectron2(*overrides, "[{}, {SOLVER.BASE_LR: 0.5}]")
    first, second = member_configs(cfg)
    assert first == cfg
    assert (second.MODEL, second.SOLVER.BASE_LR) == (cfg.MODEL, 0.5)
    with pytest.raises(ConfigError, match=r"member 1: MODEL\.RPN\.NMS_THRESH cannot differ"):
        with_detectron2(*overrides, "[{}, {MODEL.RPN.NMS_THRESH: 0.3}]")


def test_their_yaml_is_a_base_of_ours(tmp_path):
    (tmp_path / "theirs.yaml").write_text(
        "VERSION: 2\n"
        "MODEL: {META_ARCHITECTURE: RetinaNet, FPN: {IN_FEATURES: [res3, res4, res5]}}\n"
        "SOLVER:\n  STEPS: (60, 80)\n  MAX_ITER: 90\n  BASE_LR: 0.02\n"
    )
    (tmp_path / "ours.yaml").write_text(
        "_BASE_: theirs.yaml\nMODEL: {TOOLKIT: detectron2}\nIMWA: {MEMBERS: 2}\n"
    )
    cfg = load_config(tmp_path / "ours.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ([60, 80], 90)
    assert cfg.IMWA.MEMBERS == 2


def test_a_dump_is_read_again():
    cfg = with_detectron2("MODEL.FPN.NORM", "BN")
    again = parse_config(cfg.dump(), "dump")
    assert again.MODEL.FPN.NORM == "BN"
    assert again.SOLVER == cfg.SOLVER
    assert again.MODEL.ANCHOR_GENERATOR == cfg.MODEL.ANCHOR_GENERATOR


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["MODEL.RPN.NMS_TRESH", "0.5"],
            r"not a configuration key; did you mean MODEL.RPN.NMS_THR",
        ),
        (["MODEL.FPN.IN_FEATURES", "3"], r"MODEL.FPN.IN_FEATURES = 3 is not allowed"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", "(3,)"],
            r"SOLVER.STEPS has no meaning with SOLVER.LR_SCHEDULER_NAME = 'WarmupCosineLR'",
        ),
        (["SOLVER.MAX_ITER", "0"], r"SOLVER.MAX_ITER = 0 is not allowed \(must be at least 1\)"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        with_detectron2(*overrides)
