"""IMWA.ADVISE in real runs: what it measures, and that training does not notice."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import assert_equal, final_weights, train_in_parts

from ssod_imwa.runs import run
from ssod_imwa.runs.advice import numbers_in
from ssod_imwa.runs.advice_hooks import AverageLossHook, MemberLossHook
from ssod_imwa.runs.open import open_task
from ssod_imwa.visualization.plots import run_figures

pytestmark = pytest.mark.usefixtures("one_thread")
CLOCKS = ("time", "data_time", "eta_seconds", "peak_memory_mb")


@pytest.fixture
def short(digits_config):
    """Two members of a network with batch norms, four steps each, in two episodes."""

    def load(*overrides, **options):
        return digits_config(
            *("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "SOLVER.MAX_ITER", 4),
            *("SOLVER.IMS_PER_BATCH", 16, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 0.05),
            *("CLS.IMBALANCE.RATIO", 10, "DATALOADER.NUM_WORKERS", 0),
            *overrides,
            **options,
        )

    return load


def rows(cfg):
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def without_advice(cfg):
    return [{k: v for k, v in row.items() if not k.startswith("advice/")} for row in rows(cfg)]


def train_both(load, *settings):
    """A run with and one without advice."""
    plain = load(*settings, output="plain")
    advised = load(*settings, "IMWA.ADVISE", 20, output="advised")
    for cfg in (plain, advised):
        run.train(cfg)
    return plain, advised


def assert_undisturbed(plain, advised):
    assert_equal(final_weights(plain), final_weights(advised))
    assert rows(plain) == without_advice(advised)
    assert not numbers_in(rows(plain))


def test_a_classifier_is_trained_as_without_it(short):
    plain, advised = train_both(short)
    assert_undisturbed(plain, advised)
    numbers = numbers_in(rows(advised))
    assert sorted(numbers) == [0, 1]
    for of_episode in numbers.values():
        assert of_episode.worst > of_episode.members > 0
        assert of_episode.recomputed != of_episode.average
        assert of_episode.distance > 0


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["GeneralizedRCNN", "FCOS"])
def test_a_detector_and_its_teacher_are_trained_as_without_it(detection_config, detector):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "MODEL.META_ARCHITECTURE", detector)
    plain, advised = train_both(detection_config, *settings)
    assert_undisturbed(plain, advised)
    numbers = numbers_in(rows(advised))
    assert sorted(numbers) == [0, 1]
    of_teacher = [r["imwa/distance-teacher"] for r in rows(advised) if "advice/average" in r]
    assert [x.distance for x in numbers.values()] == of_teacher
    assert all(x.recomputed is not None for x in numbers.values())


@pytest.mark.slow
def test_losses_are_those_of_the_members_and_of_the_average(short):
    """Members of one episode are runs of their own."""
    together = short("IMWA.EPISODES", 1, "IMWA.ADVISE", 30)
    run.train(together)
    alone = []
    for m in range(2):
        settings = ("IMWA.EPISODES", 1, "IMWA.MEMBERS", 1, "IMWA.FIRST_MEMBER", m)
        alone.append(short(*settings, output=f"member{m}"))
        run.train(alone[-1])
    loss = open_task(together).build_training_loss(30)
    members = [loss(model_of(cfg)) for cfg in alone]
    (numbers,) = numbers_in(rows(together)).values()
    assert numbers.members == pytest.approx(sum(members) / 2, rel=1e-6)
    assert numbers.worst == pytest.approx(max(members), rel=1e-6)
    assert numbers.average == pytest.approx(loss(model_of(together)), rel=1e-6)
    assert numbers.rate == 1.0  # never lowered


def model_of(cfg):
    return open_task(cfg).load_model(str(Path(cfg.OUTPUT_DIR, "model_final.pth")))


@pytest.mark.slow
def test_recomputed_is_the_loss_of_the_average_that_bn_recompute_makes(short):
    """20 images are two of its batches of 16."""
    mean = short("IMWA.EPISODES", 1, "IMWA.ADVISE", 20, output="mean")
    settings = ("IMWA.BN", "recompute", "IMWA.BN_BATCHES", 2)
    recomputed = short("IMWA.EPISODES", 1, "IMWA.ADVISE", 20, *settings, output="recomputed")
    for cfg in (mean, recomputed):
        run.train(cfg)
    (of_mean,), (of_recomputed,) = (numbers_in(rows(c)).values() for c in (mean, recomputed))
    assert of_mean.recomputed == pytest.approx(of_recomputed.average, rel=1e-6)
    assert of_recomputed.recomputed is None


@pytest.mark.slow
def test_the_rate_is_a_share_of_the_highest_so_far(short):
    cfg = short(
        *("IMWA.ADVISE", 5, "IMWA.EPISODES", 4, "SOLVER.WARMUP_ITERS", 2, "SOLVER.STEPS", [3]),
    )
    run.train(cfg)
    assert [x.rate for x in numbers_in(rows(cfg)).values()] == pytest.approx([1, 1, 1, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_says_what_one_that_never_stopped_says(short, caplog, stop):
    """Stopped in the second member of the first episode, or in the second episode."""
    settings = ("IMWA.ADVISE", 10, "IMWA.EPISODES", 2)
    whole, parts = short(*settings, output="whole"), short(*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, stop)
    assert len(numbers_in(rows(whole))) == 2
    assert rows(parts) == rows(whole)
    assert_equal(final_weights(parts), final_weights(whole))


@pytest.mark.slow
def test_the_line_is_logged_and_drawn_after_the_evaluation(short, caplog):
    cfg = short("IMWA.ADVISE", 10, "TEST.EVAL_MEMBERS", True)
    with caplog.at_level("INFO", logger="ssod_imwa.runs.advice_hooks"):
        run.train(cfg)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("advice_hooks")]
    assert [re.match(r"average of episode (\d): ", line)[1] for line in lines] == ["1", "2"]
    assert "advice.png" in run_figures(cfg.OUTPUT_DIR)


@pytest.mark.slow
def test_a_common_part_has_no_average(short, caplog):
    cfg = short("IMWA.ADVISE", 10, "IMWA.START", 0.5)
    with caplog.at_level("INFO", logger="ssod_imwa.runs.advice_hooks"):
        run.train(cfg)
    assert sorted(numbers_in(rows(cfg))) == [1, 2]
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("advice_hooks")]
    assert [line[:20] for line in lines] == ["average of episode 1", "average of episode 2"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("IMWA.MEMBERS", 1), ("IMWA.ADVISE", 0)])
def test_without_an_average_or_the_key_there_is_nothing(short, settings):
    cfg = short("IMWA.ADVISE", 10, "IMWA.EPISODES", 1, *settings)
    run.train(cfg)
    assert not any(name.startswith("advice/") for row in rows(cfg) for name in row)
    assert "advice.png" not in run_figures(cfg.OUTPUT_DIR)


# ------------------------------------------------------------------- ranks, episodes of one member


class Ranks:
    """Processes with these ends of members, one dict each; the highest rate was 1 in all."""

    def __init__(self, ends):
        self.run = SimpleNamespace(is_main=True, all_gather=lambda own: [(x, 1.0) for x in ends])


def averaged(ends):
    """The hook after the average of an episode whose ranks measured these ends of members."""
    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(
        position=SimpleNamespace(ends_episode=True, t=0, episode=0),
        method=SimpleNamespace(evaluated_models=lambda t: {"student": model}),
        ranks=Ranks(ends),
        iter=0,
        storage=SimpleNamespace(put_scalar=lambda *a, **k: None, latest=dict),
    )
    members = MemberLossHook(lambda model: 0.5)
    members.ends = ends[0]
    hook = AverageLossHook(members, None)
    members.trainer = hook.trainer = trainer
    hook.after_step()
    assert members.ends == {}
    return hook


def test_members_of_all_ranks_count_once():
    """Two ranks trained member 0 with batch norms of their own, two member 1 at another rate."""
    first, second = {0: (1.0, 0.2)}, {0: (3.0, 0.2)}
    (numbers,) = averaged([first, second, {1: (4.0, 0.5)}, {1: (4.0, 0.5)}]).course
    assert (numbers.members, numbers.worst, numbers.average) == (3.0, 4.0, 0.5)
    assert numbers.rate == 0.5


@pytest.mark.parametrize("ends", [{0: (1.0, 1.0)}, {0: (1.0, 1.0), 1: (math.nan, 1.0)}, {}])
def test_fewer_than_two_members_are_no_average(ends):
    """An episode of one member; one that diverged and was dropped; a resume without the key."""
    hook = averaged([ends])
    assert (hook.course, hook.is_new) == ([], False)
