"""Runs whose members are trained at once, on forked ranks, against runs of members in turn."""

import json
import tempfile
from pathlib import Path

import pytest
from support import assert_equal, final_weights, needs_fork, on_ranks, stopped_in

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.config.averaging import members_at_once
from ssod_imwa.engine.checkpoint.atomic import load_checkpoint
from ssod_imwa.engine.checkpoint.output import resume_files
from ssod_imwa.errors import CheckpointError, ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.results import read_results

pytestmark = needs_fork
# Numbers of a row that are measured or that differ as the clock does.
UNLIKE = ("iteration", "time", "data_time", "eta_seconds", "peak_memory_mb")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Bitwise comparisons and forked ranks want one thread."""


@pytest.fixture
def config(detection_config):
    def load(*overrides, output="run"):
        settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "TEST.EVAL_MEMBERS", True)
        return detection_config(*settings, *overrides, output=output)

    return load


@pytest.fixture
def train(tmp_path):
    """A function that trains a configuration on forked ranks; their exit codes."""

    def train(cfg, size, **options):
        def work(rank):
            return run.train(cfg, Ranks.of_run(members_at_once(cfg)), **options)

        return on_ranks(size, work, Path(tempfile.mkdtemp(dir=tmp_path)))

    return train


def rows(cfg, name="metrics.json"):
    """What a file of rows says, by where it stands on a member's own clock."""
    lines = Path(cfg.OUTPUT_DIR, name).read_text().splitlines()
    content = [{k: v for k, v in json.loads(x).items() if k not in UNLIKE} for x in lines]
    for row in content:
        if row["member"] == 0:  # in turn, an average's numbers are in the last member's row alone
            for name in [name for name in row if name.startswith(("imwa/", "advice/"))]:
                del row[name]
    return sorted(content, key=lambda row: (row["t"], str(row["member"]), sorted(row)))


def evaluations(cfg):
    """All but the global step; as text: NaN is not equal to itself."""
    return sorted(
        str((x.model, x.stage, x.episode, x.member, x.t, x.metrics))
        for x in read_results(cfg.OUTPUT_DIR).evaluations
    )


def assert_same_run(first, second):
    assert_equal(final_weights(first), final_weights(second))
    assert evaluations(first) == evaluations(second)
    assert rows(first) == rows(second)


def test_two_members_on_two_ranks_equal_those_in_turn_and_resume_to_the_same(config, train):
    in_turn = config("TEST.EVAL_PERIOD", 1, output="turn")
    at_once = config("TEST.EVAL_PERIOD", 1, "IMWA.PARALLEL", True, output="once")
    assert run.train(in_turn) == 0
    with stopped_in(2, rank=1):
        assert train(at_once, 2) == [143, 143]
    assert list(resume_files(at_once.OUTPUT_DIR)) == [2, 1]
    assert train(at_once, 2, resume_from=True) == [0, 0]
    assert_same_run(in_turn, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 3])
def test_a_common_part_is_the_same_and_resumes_on_four_ranks(config, train, stop):
    """Two ranks a member against two ranks in turn; stopped at its end and in the common part."""
    settings = (
        "IMWA.START",
        0.25,
        "MODEL.RESNETS.NORM",
        "FrozenBN",
        "SSOD.ALGORITHM",
        "supervised",
    )
    in_turn = config(*settings, output="turn")
    at_once = config(*settings, "IMWA.PARALLEL", True, output="once")
    assert train(in_turn, 2) == [0, 0]
    with stopped_in(stop, rank=3):
        assert train(at_once, 4) == [143] * 4
    assert train(at_once, 4, resume_from=True) == [0] * 4
    assert_same_run(in_turn, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("bn", ["mean", "recompute"])
def test_classifiers_and_what_watches_them_are_the_same(digits_config, train, bn):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "IMWA.START", 0.2, "IMWA.BN", bn)
    settings += ("CLS.SCHEDULE.EPOCHS", 0.2, "CLS.TRACK_PERIOD", 3, "CLS.SNAPSHOT_PERIOD", 3)
    settings += ("TEST.EVAL_MEMBERS", True, "TEST.EVAL_PERIOD", 4, "IMWA.BN_BATCHES", 8)
    in_turn = digits_config(*settings, output="turn")
    at_once = digits_config(*settings, "IMWA.PARALLEL", True, output="once")
    assert run.train(in_turn) == 0
    assert train(at_once, 2) == [0, 0]
    assert_same_run(in_turn, at_once)
    assert rows(in_turn, "classes.json") == rows(at_once, "classes.json")
    kept = [sorted(Path(x.OUTPUT_DIR, "snapshots").glob("*.pth")) for x in (in_turn, at_once)]
    assert [path.name for path in kept[0]] == [path.name for path in kept[1]]
    for one, other in zip(*kept, strict=True):
        assert_equal(*(load_checkpoint(path)["student"] for path in (one, other)))


def test_the_mean_of_the_last_averages_is_one_model_on_all_ranks(digits_config, train):
    settings = ("IMWA.LAWA", 2, "IMWA.EPISODES", 2, "IMWA.BN", "recompute", "IMWA.BN_BATCHES", 2)
    cfg = digits_config(*settings, "SOLVER.MAX_ITER", 4, "SOLVER.IMS_PER_BATCH", 8)
    assert train(cfg, 2) == [0, 0]
    (lawa,) = read_results(cfg.OUTPUT_DIR).of_lawa("student")
    written = run.evaluate(cfg, Path(cfg.OUTPUT_DIR, "model_lawa.pth"))
    assert written == pytest.approx(lawa.metrics)


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_a_member_that_is_dropped_stops_nobody(config, train, common):
    """Before labels begin, so that it has none, and after; the others are still evaluated."""
    settings = ("IMWA.NONFINITE", "drop", "TEST.EVAL_PERIOD", 1, "IMWA.START", common)
    settings += ("IMWA.MEMBER_OVERRIDES", [{}, {"SOLVER.BASE_LR": 1e30}], "SOLVER.MAX_ITER", 8)
    settings += ("IMWA.ADVISE", 2, "IMWA.CROSS_TEACH", "other", "LOG_PERIOD", 1)
    settings += ("SSOD.BURN_IN_ITERS", 2)
    in_turn = config(*settings, output="turn")
    at_once = config(*settings, "IMWA.PARALLEL", True, output="once")
    assert run.train(in_turn) == 0
    ends = [x for x in read_results(in_turn.OUTPUT_DIR).evaluations if x.stage == "member"]
    assert {x.member for x in ends} == {0}
    assert train(at_once, 2) == [0, 0]
    assert_same_run(in_turn, at_once)


@pytest.mark.slow
def test_a_run_in_turn_does_not_go_on_at_once(config, tmp_path):
    assert run.train(config()) == 0
    message = r"differs in IMWA.PARALLEL \(saved False, now True\), .*processes \(saved 1, now 2\)"
    at_once = config("IMWA.PARALLEL", True)
    for inexact, said in (
        (False, message),
        (True, "is of members in turn, which a run of 2 members"),
    ):

        def fail(rank, inexact=inexact, said=said):
            ranks = Ranks.of_run(2)
            with pytest.raises(CheckpointError, match=said):
                run.train(at_once, ranks, resume_from=True, allow_inexact=inexact)

        on_ranks(2, fail, Path(tempfile.mkdtemp(dir=tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("IMWA.MEMBERS", 1), "IMWA.PARALLEL = True is not allowed with IMWA.MEMBERS = 1"),
        (("IMWA.START", 1.0), "IMWA.PARALLEL = True is not allowed .* IMWA.START = 1 "),
        (("IMWA.OPTIMIZER_STATE", "carry"), "'carry' is not allowed with IMWA.PARALLEL"),
        (("IMWA.STORE", "stream"), "IMWA.STORE .*IMWA.PARALLEL"),
    ],
)
def test_what_has_no_meaning_at_once_is_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        config("IMWA.PARALLEL", True, *settings)


def test_ranks_that_train_members_in_turn_are_refused(config):
    with pytest.raises(ConfigError, match=r"IMWA.PARALLEL = True .* ranks that train 1 at once"):
        run.train(config("IMWA.PARALLEL", True))


@pytest.mark.slow
def test_members_that_differ_and_label_for_each_other_do_so_at_once(config, train):
    """With every other way to average; stopped in the second episode."""
    settings = ("IMWA.CROSS_TEACH", "other", "IMWA.LAWA", 2, "IMWA.OUTER.LR", 0.5)
    settings += ("IMWA.MEMBER_OVERRIDES", "[{}, {SOLVER.BASE_LR: 0.005}]")
    in_turn = config(*settings, output="turn")
    at_once = config(*settings, "IMWA.PARALLEL", True, output="once")
    assert run.train(in_turn) == 0
    with stopped_in(2, rank=0):
        assert train(at_once, 2) == [143, 143]
    assert train(at_once, 2, resume_from=True) == [0, 0]
    assert_same_run(in_turn, at_once)
