"""Members that label for each other: IMWA.CROSS_TEACH."""

import json
from functools import partial
from pathlib import Path

import pytest
from support import assert_equal, final_weights, train_in_parts

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)


@pytest.fixture
def configs(detection_config, digits_fixmatch_config):
    """A function that loads a short run of each task's method with a teacher that labels."""
    average = ("CLS.EMA_DECAY", 0.9, "CLS.LABELER.THRESHOLD", 0.2, "SOLVER.MAX_ITER", 4)
    return {"detection": detection_config, "fixmatch": partial(digits_fixmatch_config, *average)}


def losses(cfg):
    lines = map(json.loads, Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines())
    return [row["total_loss"] for row in lines if "total_loss" in row]


@pytest.mark.parametrize("rule", ["other", pytest.param("agree", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("detection", marks=pytest.mark.slow), "fixmatch"])
def test_other_labels_come_with_the_second_episode(configs, kind, rule):
    plain = configs[kind](*TWO, output="plain")
    taught = configs[kind](*TWO, "IMWA.CROSS_TEACH", rule, output="taught")
    for cfg in (plain, taught):
        run.train(cfg)
    # Both members have two iterations in each episode.
    assert losses(taught)[:4] == losses(plain)[:4]
    assert losses(taught)[4:] != losses(plain)[4:]


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("fixmatch", 3),  # the last step of the first episode
        ("fixmatch", 6),  # the first step of the second episode's second member
        pytest.param("detection", 6, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(configs, kind, stop):
    settings = (*TWO, "IMWA.CROSS_TEACH", "other")
    whole, parts = (
        configs[kind](*settings, output="whole"),
        configs[kind](*settings, output="parts"),
    )
    run.train(whole)
    train_in_parts(parts, stop)
    assert_equal(final_weights(whole), final_weights(parts))
    assert losses(whole) == losses(parts)


@pytest.mark.parametrize(("members", "episodes"), [(1, 2), (2, 1)])
def test_a_rule_that_would_do_nothing_is_refused(members, episodes):
    overrides = ["IMWA.MEMBERS", str(members), "IMWA.EPISODES", str(episodes)]
    with pytest.raises(ConfigError, match=r"IMWA.CROSS_TEACH = 'other' is not allowed with IMWA.M"):
        load_config(overrides=[*overrides, "IMWA.CROSS_TEACH", "other"])


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("detection", ("SSOD.ALGORITHM", "supervised"), "with 'supervised' .*: it has no teacher"),
        (
            "detection",
            ("SSOD.ALGORITHM", "dense_teacher"),
            r"'agree' is not allowed with 'dense_teacher' \(must be one of 'none', 'other'\)",
        ),
        ("fixmatch", ("CLS.EMA_DECAY", 0.0), "with 'fixmatch' .*: it has no teacher"),
        (
            "fixmatch",
            ("CLS.FIXMATCH.SECOND_HEAD", "abc"),
            r"with 'fixmatch \+ abc' \(must be one of 'none'\)",
        ),
    ],
)
def test_methods_whose_labels_do_not_go_with_the_rule_are_refused(
    configs, kind, overrides, message
):
    cfg = configs[kind](*TWO, *overrides, "IMWA.CROSS_TEACH", "agree")
    with pytest.raises(ConfigError, match=message):
        run.train(cfg)
