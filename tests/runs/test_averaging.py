"""Whole runs under the keys of docs/averaging.md."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from support import assert_equal, final_weights, train_in_parts

from ssod_imwa.classification.tracking import SNAPSHOT_FOLDER, snapshot_files
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.schedule import schedule_of

pytestmark = pytest.mark.usefixtures("one_thread")

DILOCO = ("IMWA.OUTER.LR", 0.7, "IMWA.OUTER.MOMENTUM", 0.9, "IMWA.OUTER.NESTEROV", True)
IMWA = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)
AVERAGE = ("IMWA.OPTIMIZER_STATE", "average")
QSR = ("IMWA.EPISODE_LENGTHS", "qsr", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR")


@pytest.fixture
def config(digits_config):
    """Runs of a small network and its EMA on long-tailed digits."""
    settings = ("CLS.IMBALANCE.RATIO", 20, "CLS.EMA_DECAY", 0.9, "SOLVER.BASE_LR", 0.1)
    settings += ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 1, "SOLVER.IMS_PER_BATCH", 16)
    return partial(digits_config, *settings, "DATALOADER.NUM_WORKERS", 0)


def rows(cfg):
    """metrics.json without what depends on the clock and the machine."""
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    free = ("time", "data_time", "eta_seconds", "peak_memory_mb")
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def test_members_that_never_part_are_the_plain_run(config):
    """Its models, its metrics, its evaluations and what is concluded from them."""
    options = ("TEST.EVAL_MEMBERS", True, "TEST.EVAL_PERIOD", 1)
    plain = config(*options, output="plain")
    late = config(*options, *IMWA, *DILOCO, "IMWA.START", 1.0, output="late")
    for cfg in (plain, late):
        run.train(cfg)
    assert_equal(final_weights(plain), final_weights(late))
    assert rows(plain) == rows(late)
    first, second = (read_results(cfg.OUTPUT_DIR) for cfg in (plain, late))
    assert str(first.evaluations) == str(second.evaluations)
    assert str(first.summary()) == str(second.summary())
    assert first.global_steps == second.global_steps == 4


def test_a_member_that_diverges_is_dropped_and_nobody_looks_at_it(config, caplog):
    """It learns in the common part; the average is the other member's, in both episodes."""
    cfg = config(
        *IMWA,
        *("SOLVER.MAX_ITER", 6, "IMWA.START", 1 / 3, "IMWA.NONFINITE", "drop", "IMWA.ADVISE", 16),
        *("IMWA.MEMBER_OVERRIDES", [{}, {"SOLVER.BASE_LR": 1e30}]),
        *("TEST.EVAL_MEMBERS", True, "TEST.EVAL_PERIOD", 1, "LOG_PERIOD", 1),
        *("CLS.SNAPSHOT_PERIOD", 1, "CLS.TRACK_PERIOD", 1),
    )
    run.train(cfg)
    output = Path(cfg.OUTPUT_DIR)
    snapshots = sorted(path.name for path in snapshot_files(output / SNAPSHOT_FOLDER).values())
    assert [name for name in snapshots if name.startswith("member1")] == []
    tracked = [json.loads(line) for line in (output / "classes.json").read_text().splitlines()]
    evaluations = read_results(cfg.OUTPUT_DIR).evaluations
    for members in ({row["member"] for row in tracked}, {x.member for x in evaluations} - {None}):
        assert members == {0}
    plain = config("SOLVER.MAX_ITER", 6, output="plain")
    run.train(plain)
    assert_equal(final_weights(cfg), final_weights(plain))
    dropped = [x.getMessage() for x in caplog.records if "turn is skipped" in x.getMessage()]
    assert len(dropped) == 2  # in each episode
    assert dropped[0].startswith("after global step 5 logits of 364 of 364 images are not finite")


def test_a_run_that_was_stopped_while_a_member_is_dropped_goes_on_the_same(config):
    """The last of three members diverges; what is said of averages stands in rows without it."""

    def diverging(output):
        return config(
            *("IMWA.MEMBERS", 3, "IMWA.EPISODES", 2, "SOLVER.MAX_ITER", 6, "LOG_PERIOD", 1),
            *("IMWA.NONFINITE", "drop", "IMWA.ADVISE", 16),
            *("IMWA.MEMBER_OVERRIDES", [{}, {}, {"SOLVER.BASE_LR": 1e30}]),
            output=output,
        )

    whole, parts = diverging("whole"), diverging("parts")
    run.train(whole)
    train_in_parts(parts, stop=7)  # its second step, in which the loss is not finite
    assert_equal(final_weights(whole), final_weights(parts))
    assert rows(whole) == rows(parts)
    advised = [row["iteration"] for row in rows(whole) if "advice/average" in row]
    assert advised == [8, 17]


def test_the_common_part_is_evaluated_as_an_average_and_not_as_a_member(config):
    options = ("SOLVER.MAX_ITER", 6, "TEST.EVAL_MEMBERS", True, "TEST.EVAL_PERIOD", 2)
    cfg = config(*options, *IMWA, "IMWA.START", 1 / 3, "TEST.EVAL_EPISODES", 2)
    run.train(cfg)
    results = read_results(cfg.OUTPUT_DIR)
    students = [
        (x.stage, x.episode, x.member, x.t) for x in results.evaluations if x.model == "student"
    ]
    assert students == [
        ("average", 0, None, 1),
        ("running", 1, 0, 3),
        ("running", 1, 1, 3),
        ("member", 2, 0, 5),
        ("member", 2, 1, 5),
        ("final", 2, None, 5),
    ]
    # The course of the run is judged by its common part, too.
    assert [x.t for x in results.series("student")] == [1, 5]
    steps = [(row["episode"], row["member"], row["t"]) for row in rows(cfg) if "total_loss" in row]
    order = [(1, 0, 2), (1, 0, 3), (1, 1, 2), (1, 1, 3), (2, 0, 4), (2, 0, 5), (2, 1, 4), (2, 1, 5)]
    assert steps == [(0, 0, 0), (0, 0, 1), *order]
    assert results.global_steps == len(steps)


LATE = ("IMWA.START", 0.6, "SOLVER.MAX_ITER", 5, "SOLVER.OPTIMIZER", "AdamW")


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        pytest.param(LATE, 1, marks=pytest.mark.slow),  # inside the common part
        pytest.param(LATE, 2, marks=pytest.mark.slow),  # its last step
        (LATE, 3),  # the first one of the first member
        pytest.param(LATE, 4, marks=pytest.mark.slow),  # the first one of the second member
        pytest.param(QSR, 5, marks=pytest.mark.slow),
        pytest.param(DILOCO, 4, marks=pytest.mark.slow),
        pytest.param((*DILOCO, "IMWA.MEMBERS", 1), 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(config, changes, stop):
    settings = (*IMWA, *changes)
    whole = config(*settings, output="whole")
    parts = config(*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, stop)
    assert_equal(final_weights(whole), final_weights(parts))
    assert rows(whole) == rows(parts)
    first, second = (read_results(cfg.OUTPUT_DIR).evaluations for cfg in (whole, parts))
    assert str(first) == str(second)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (1.5, r"IMWA.START = 1.5 is not allowed \(must be 0..1\)"),
        (0.75, r"IMWA.EPISODES = 2 is not allowed \(must be 1..SOLVER.MAX_ITER \(1 - IMWA.START"),
    ],
)
def test_a_start_that_leaves_no_room_is_refused(config, start, message):
    with pytest.raises(ConfigError, match=message):
        config(*IMWA, "IMWA.START", start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            (*AVERAGE, "IMWA.MEMBER_OVERRIDES", [{}, {"SOLVER.MOMENTUM": 0}]),
            r"'average' is not allowed with members whose SOLVER.MOMENTUM is 0.9 and 0",
        ),
        (  # as YAML reads a number without a dot
            (*AVERAGE, "IMWA.MEMBER_OVERRIDES", "[{SOLVER.MOMENTUM: 9e-1}, {SOLVER.MOMENTUM: 0}]"),
            r"'average' is not allowed with members whose SOLVER.MOMENTUM is 9e-1 and 0",
        ),
        (
            ("IMWA.OPTIMIZER_STATE", "carry", "IMWA.NONFINITE", "drop"),
            "IMWA.NONFINITE = 'drop' is not allowed with IMWA.OPTIMIZER_STATE = 'carry'",
        ),
    ],
)
def test_optimizer_states_that_cannot_be_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(*IMWA, *changes)


def test_adamws_states_are_averaged_with_a_member_whose_first_beta_is_0(config):
    member = ("IMWA.MEMBER_OVERRIDES", [{}, {"SOLVER.MOMENTUM": 0}])
    assert run.train(config(*IMWA, *AVERAGE, *member, "SOLVER.OPTIMIZER", "AdamW")) == 0


def test_the_log_says_what_is_trained_in_common(config, caplog):
    caplog.set_level("INFO")
    run.train(config(*IMWA, "IMWA.START", 0.5))
    words = (
        "schedule: 4 iterations of each of 2 members, 6 global steps in all, the first 2 in common,"
        " then in 2 episodes; 16 images an iteration"
    )
    assert words in caplog.messages
    assert any(line.startswith("common part  iteration 2/2  average") for line in caplog.messages)


def test_weights_of_members_that_never_part_are_not_asked_for(config):
    weights = ("IMWA.COEFFICIENTS", [0.25, 0.75], "SOLVER.MAX_ITER", 1, "IMWA.MEMBERS", 2)
    assert run.train(config(*weights, "IMWA.START", 1.0)) == 0


def test_episodes_by_rate_end_where_the_sum_of_squared_rates_says(config):
    """SOLVER's cosine over 8 iterations; the first is of the warm-up, with almost no rate."""
    cfg = config(*QSR, *IMWA, "SOLVER.MAX_ITER", 8, "IMWA.EPISODES", 3)
    run.train(cfg)
    rates = [0.001] + [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(1, 8)]
    sums = [sum(rate**2 for rate in rates[: t + 1]) for t in range(8)]
    ends = [max(t for t in range(8) if sums[t] <= e / 3 * sums[-1]) for e in (1, 2)]
    results = read_results(cfg.OUTPUT_DIR)
    assert [x.t for x in results.evaluations if x.model == "student"] == [*ends, 7]
    assert results.episode_lengths == (ends[0] + 1, ends[1] - ends[0], 7 - ends[1])
    bounds = [schedule_of(results).bounds(e)[1] - 1 for e in range(3)]
    assert bounds == [*ends, 7]


@pytest.mark.slow
def test_a_plain_run_keeps_its_bits_wherever_its_episodes_end(config):
    uniform = config(*QSR[2:], "IMWA.EPISODES", 3, output="uniform")
    by_rate = config(*QSR, "IMWA.EPISODES", 3, output="by_rate")
    for cfg in (uniform, by_rate):
        run.train(cfg)
    assert_equal(final_weights(uniform), final_weights(by_rate))


def test_a_rate_that_is_0_for_too_long_is_a_users_error(config):
    falls = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.GAMMA", 0.0)
    cfg = config(*IMWA, *falls, "SOLVER.STEPS", [1], "IMWA.EPISODE_LENGTHS", "qsr")
    with pytest.raises(ConfigError, match=r"'qsr' is not allowed: episodes = 2 .* 1\.\.1, the it"):
        run.train(cfg)


def test_a_plain_run_takes_outer_steps(config):
    """One iteration: the student goes half of the way, its EMA and its buffers all of it."""
    settings = ("SOLVER.MAX_ITER", 1)
    plain = config(*settings, output="plain")
    half = config(*settings, "IMWA.OUTER.LR", 0.5, output="half")
    start = config(*settings, "SOLVER.BASE_LR", 0.0, output="start")
    for cfg in (plain, half, start):
        run.train(cfg)
    begins, ends, found = (final_weights(cfg) for cfg in (start, plain, half))
    name = "student.classifier.weight"
    assert torch.equal(found[name], ((begins[name].double() + ends[name].double()) / 2).float())
    assert not torch.equal(begins[name], ends[name])
    running = [key for key in found if key.startswith("teacher.") or "running" in key]
    assert_equal({key: found[key] for key in running}, {key: ends[key] for key in running})


def test_weights_before_an_outer_step_are_evaluated_as_running_ones(config):
    """The average of one member is not what was trained there."""
    cfg = config("IMWA.EPISODES", 2, *DILOCO, "TEST.EVAL_PERIOD", 1, "CLS.EMA_DECAY", 0.0)
    run.train(cfg)
    stages = [(x.stage, x.t) for x in read_results(cfg.OUTPUT_DIR).evaluations]
    assert stages == [
        *(("running", 0), ("running", 1), ("average", 1)),
        *(("running", 2), ("running", 3), ("final", 3)),
    ]


def test_nesterov_needs_a_momentum(config):
    with pytest.raises(ConfigError, match=r"IMWA.OUTER.NESTEROV .* IMWA.OUTER.MOMENTUM"):
        config("IMWA.OUTER.NESTEROV", True)
