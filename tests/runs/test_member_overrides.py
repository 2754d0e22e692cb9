"""Members that differ: IMWA.MEMBER_OVERRIDES."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from support import assert_equal, final_weights, mean_of, train_in_parts

from ssod_imwa.errors import ConfigError
from ssod_imwa.papers.reproduction import scaled
from ssod_imwa.runs import run
from ssod_imwa.runs.batch_scale import scale_batch
from ssod_imwa.runs.config import PER_MEMBER_KEYS, load_config, member_configs, parse_config

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTOR = {
    "SOLVER.BASE_LR": 0.03,
    "SOLVER.MOMENTUM": 0.8,
    "SOLVER.WEIGHT_DECAY": 0.01,
    "SOLVER.STEPS": [2],
    "SSOD.BBOX_THRESHOLD": 0.6,
    "SSOD.UNSUP_LOSS_WEIGHT": 2.0,
    "INPUT.STRONG.GRAYSCALE": 1.0,
    "INPUT.RANDOM_FLIP": "none",
}
CLASSIFIER = {
    "SOLVER.BASE_LR": 0.2,
    "SOLVER.NESTEROV": True,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPartOfCosineLR",
    "SOLVER.COSINE_CYCLES": 0.1,
    "CLS.SAMPLER.NAME": "class",
    "CLS.SAMPLER.PER_DRAW": 2,
    "CLS.LOSS.NAME": "focal",
    "CLS.LOSS.GAMMA": 2.0,
    "CLS.INPUT.VIEWS": ["strong"],
}
FIXMATCH = {
    "CLS.LABELER.THRESHOLD": 0.2,
    "CLS.FIXMATCH.UNSUP_LOSS_WEIGHT": 3.0,
    "CLS.LOSS.NAME": "balanced_softmax",
    "CLS.INPUT.CUTOUT": 4,
}
BLOCKS = {"detection": DETECTOR, "classification": CLASSIFIER, "fixmatch": FIXMATCH}


@pytest.fixture
def configs(detection_config, digits_config, digits_fixmatch_config):
    """A function that loads a short run of each kind, by the name of its block."""
    short = ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 1)
    few = ("SOLVER.IMS_PER_BATCH", 8, "CLS.IMBALANCE.RATIO", 10, "SOLVER.BASE_LR", 0.05)
    return {
        "detection": detection_config,
        "classification": partial(digits_config, *short, *few),
        "fixmatch": partial(digits_fixmatch_config, *short),
    }


def flat(block):
    return [item for pair in block.items() for item in pair]


def rows(cfg):
    return list(map(json.loads, Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()))


@pytest.mark.parametrize(
    "kind", ["classification", "fixmatch", pytest.param("detection", marks=pytest.mark.slow)]
)
def test_members_that_differ_in_nothing_are_members_without_overrides(configs, kind):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)
    plain = configs[kind](*settings, *flat(BLOCKS[kind]), output="plain")
    overrides = ("IMWA.MEMBER_OVERRIDES", [BLOCKS[kind]] * 2)
    same = configs[kind](*settings, *overrides, output="same")
    for cfg in (plain, same):
        run.train(cfg)
    assert_equal(final_weights(plain), final_weights(same))


@pytest.mark.parametrize(
    "kind", [pytest.param("detection", marks=pytest.mark.slow), "classification", "fixmatch"]
)
def test_members_that_differ_are_runs_of_their_own(configs, kind):
    blocks = [{}, BLOCKS[kind]]
    settings = ("IMWA.MEMBERS", 2, "IMWA.MEMBER_OVERRIDES", blocks)
    together = configs[kind](*settings, output="together")
    alone = [
        configs[kind]("IMWA.FIRST_MEMBER", m, *flat(block), output=f"member{m}")
        for m, block in enumerate(blocks)
    ]
    for cfg in (together, *alone):
        run.train(cfg)
    first, second = map(final_weights, alone)
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert_equal(final_weights(together), mean_of(first, second))
    rates = [row["lr"] for row in rows(together) if "lr" in row]
    assert rates == [row["lr"] for cfg in alone for row in rows(cfg) if "lr" in row]


def test_in_the_common_part_the_settings_of_the_run_hold(configs):
    def losses(cfg):
        return [(row["lr"], row["total_loss"]) for row in rows(cfg) if "total_loss" in row]

    blocks = [CLASSIFIER, {"SOLVER.BASE_LR": 0.01}]
    differing = ("IMWA.MEMBERS", 2, "IMWA.MEMBER_OVERRIDES", blocks)
    plain = configs["classification"](output="plain")
    late = configs["classification"](*differing, "IMWA.START", 0.5, output="late")
    never = configs["classification"](*differing, "IMWA.START", 1, output="never")
    for cfg in (plain, late, never):
        run.train(cfg)
    assert losses(late)[:2] == losses(plain)[:2]
    assert losses(late)[2] != losses(plain)[2]
    assert [rate for rate, _ in losses(late)[4:]] == [0.01, 0.01]
    assert_equal(final_weights(plain), final_weights(never))


@pytest.mark.parametrize(
    "kind", ["classification", pytest.param("detection", marks=pytest.mark.slow)]
)
def test_a_run_stopped_in_the_middle_of_member_1_goes_on_as_if_nothing_was(configs, kind):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "IMWA.MEMBER_OVERRIDES", [{}, BLOCKS[kind]])
    whole = configs[kind](*settings, output="whole")
    parts = configs[kind](*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, 2)  # the first of two steps of member 1
    assert_equal(final_weights(whole), final_weights(parts))


@pytest.mark.slow  # two worker processes import torch
def test_worker_processes_make_the_views_of_the_member(configs):
    settings = ("IMWA.MEMBERS", 2, "IMWA.MEMBER_OVERRIDES", [{}, DETECTOR])
    alone = configs["detection"](*settings, output="alone")
    helped = configs["detection"](*settings, "DATALOADER.NUM_WORKERS", 2, output="helped")
    for cfg in (alone, helped):
        run.train(cfg)
    assert_equal(final_weights(alone), final_weights(helped))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["[{}, {SOLVER: {MAX_ITER: 3}}]"], "member 1: SOLVER.MAX_ITER cannot differ .*BASE_LR"),
        (["[{MODEL.BACKBONE.NAME: x}, {}]"], "member 0: MODEL.BACKBONE.NAME cannot differ"),
        (["[{IMWA.MEMBERS: 3}, {}]"], "member 0: IMWA.MEMBERS cannot differ"),
        (["[{}, {SOLVER.BASE_LRS: 1}]"], "member 1: SOLVER.BASE_LRS is not .*did you mean"),
        (["[{}, {SOLVER.BASE_LR: -1}]"], "member 1: SOLVER.BASE_LR = -1.0 is not allowed"),
        (["[{}, {SOLVER.STEPS: [5, 3]}]"], r"member 1: SOLVER.STEPS = \[5, 3\] is not allowed"),
        (["[{}, {SSOD.BBOX_THRESHOLD: 0.5}]"], "member 1: SSOD.BBOX_THRESHOLD has no meaning"),
        (["[{}, 3]"], r"= 3 is not allowed \(must be a list of blocks"),
        (["[{}, {SOLVER.GAMMA: 1, SOLVER: {GAMMA: 2}}]"], "SOLVER.GAMMA stands twice"),
        (["[{}]"], "has 1 blocks for IMWA.MEMBERS = 2"),
        (["[{}, {}]", "IMWA.MEMBERS", "1"], "is not allowed with IMWA.MEMBERS = 1"),
    ],
)
def test_what_cannot_differ_is_refused_by_member_and_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=["IMWA.MEMBERS", "2", "IMWA.MEMBER_OVERRIDES", *overrides])


@pytest.mark.parametrize(
    ("kind", "overrides", "block", "message"),
    [
        ("classification", (), {"CLS.LOSS.NAME": "ldam"}, "member 1: .*needs CLS.MODEL.CLASSIFIER"),
        ("classification", (), {"CLS.INPUT.VIEWS": ["plain"] * 2}, "member 1: .*must be 1: image"),
        (
            "classification",
            ("CLS.MIX.KIND", "mixup"),
            {"CLS.LOSS.NAME": "focal"},
            "member 1: CLS.MIX: mixup with focal is not allowed",
        ),
        (
            "detection",
            ("SSOD.ALGORITHM", "dense_teacher"),
            {"INPUT.STRONG.KIND": "geometric"},
            "member 1: INPUT.STRONG.KIND = 'geometric' is not allowed",
        ),
    ],
)
def test_what_does_not_go_with_the_method_is_refused_before_training(
    configs, kind, overrides, block, message
):
    cfg = configs[kind](*overrides, "IMWA.MEMBERS", 2, "IMWA.MEMBER_OVERRIDES", [{}, block])
    with pytest.raises(ConfigError, match=message):
        run.train(cfg)
    assert not Path(cfg.OUTPUT_DIR, "metrics.json").exists()


def test_blocks_are_kept_in_one_form_and_survive_a_dump():
    written = "[{}, {SOLVER: {BASE_LR: 1e-3, STEPS: [7]}, SOLVER.GAMMA: 1}]"
    cfg = load_config(overrides=["IMWA.MEMBERS", "2", "IMWA.MEMBER_OVERRIDES", written])
    block = {"SOLVER.BASE_LR": 0.001, "SOLVER.STEPS": [7], "SOLVER.GAMMA": 1.0}
    assert [{}, block] == cfg.IMWA.MEMBER_OVERRIDES
    assert parse_config(cfg.dump(), "dump") == cfg


def test_keys_of_what_a_member_does_not_use_are_not_in_its_configuration():
    settings = ["TASK", "classification", "CLS.SAMPLER.NAME", "class", "CLS.SAMPLER.PER_DRAW", "4"]
    blocks = "[{}, {CLS.SAMPLER.NAME: instance, CLS.LOSS: {NAME: focal, GAMMA: 3}}]"
    cfg = load_config(overrides=[*settings, "IMWA.MEMBERS", "2", "IMWA.MEMBER_OVERRIDES", blocks])
    first, second = member_configs(cfg)
    assert first.CLS == cfg.CLS
    assert dict(second.CLS.SAMPLER) == {"NAME": "instance"}
    assert second.CLS.LOSS.GAMMA == 3


def test_a_member_may_have_a_schedule_of_another_kind():
    blocks = "[{}, {SOLVER: {LR_SCHEDULER_NAME: WarmupMultiStepLR, STEPS: [7], GAMMA: 0.5}}]"
    settings = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "IMWA.MEMBERS", "2"]
    cfg = load_config(overrides=[*settings, "IMWA.MEMBER_OVERRIDES", blocks])
    first, second = member_configs(cfg)
    assert ("STEPS" in first.SOLVER, second.SOLVER.STEPS, second.SOLVER.GAMMA) == (False, [7], 0.5)
    assert parse_config(cfg.dump(), "dump") == cfg


def test_schedules_and_batches_are_scaled_in_blocks_too():
    blocks = "[{}, {SOLVER: {BASE_LR: 0.04, STEPS: [10, 20], GAMMA: 0.5}}]"
    overrides = ["IMWA.MEMBERS", "2", "IMWA.MEMBER_OVERRIDES", blocks]
    cfg = load_config(overrides=[*overrides, "SOLVER.MAX_ITER", "40"])
    assert scaled(cfg, 2).IMWA.MEMBER_OVERRIDES[1] == {
        "SOLVER.BASE_LR": 0.04,
        "SOLVER.STEPS": [20, 40],
        "SOLVER.GAMMA": 0.5,
    }
    batch, changes = scale_batch(cfg, 8)  # half of the default
    expected = {"SOLVER.BASE_LR": 0.02, "SOLVER.STEPS": [20, 40], "SOLVER.GAMMA": 0.5}
    assert [{}, expected] == batch.IMWA.MEMBER_OVERRIDES
    assert "IMWA.MEMBER_OVERRIDES" in {change.key for change in changes}


def test_nothing_that_is_shared_by_members_may_differ():
    groups = {key.split(".")[0] for key in PER_MEMBER_KEYS}
    assert groups == {"SOLVER", "SSOD", "INPUT", "CLS"}
    shared = {"SOLVER.MAX_ITER", "SOLVER.OPTIMIZER", "SOLVER.IMS_PER_BATCH", "CLS.INPUT.SIZE"}
    shared |= {"SSOD.BURN_IN_ITERS", "SSOD.EMA_DECAY", "SSOD.STRONG_LABELED", "CLS.EMA_DECAY"}
    assert not shared & PER_MEMBER_KEYS
