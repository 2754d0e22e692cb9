"""Whole runs with labeled and unlabeled digits, of every composition, with tiny networks."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from support import assert_equal, final_weights

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.export import trained_classifier
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).parents[2] / "configs/cifar10_lt_semi"
TWO_VIEWS = (
    *("CLS.FIXMATCH.STRONG_VIEWS", 2),
    *("CLS.INPUT.UNLABELED_VIEWS", ["weak", "randaugment", "randaugment"]),
)
LA = ("CLS.LOSS.NAME", "balanced_softmax")
COMPOSITIONS = {
    "fixmatch": (),
    "fixmatch + la": LA,
    "fixmatch + la + darp": (*LA, "CLS.LABELER.NAME", "darp"),
    "fixmatch + la + alignment": (*LA, "CLS.LABELER.NAME", "alignment"),
    "fixmatch + la + daso": (*LA, "CLS.LABELER.NAME", "daso", "CLS.LABELER.WARMUP", 1),
    "fixmatch + abc": ("CLS.FIXMATCH.SECOND_HEAD", "abc", *TWO_VIEWS),
    "fixmatch + abc + daso": ("CLS.FIXMATCH.SECOND_HEAD", "abc", "CLS.LABELER.NAME", "daso"),
    "acr": (
        *("CLS.LABELER.NAME", "acr", "CLS.FIXMATCH.SECOND_HEAD", "balanced", *TWO_VIEWS),
        *("CLS.UNLABELED.MEMBERSHIP", "joint", "CLS.LABELER.EPOCH", 1),
        *("CLS.LABELER.START_EPOCH", 1),
    ),
    "mean_teacher": ("CLS.ALGORITHM", "mean_teacher"),
}


@pytest.fixture
def config(digits_fixmatch_config):
    return partial(digits_fixmatch_config, "CLS.EMA_DECAY", 0.9, "SOLVER.MAX_ITER", 2)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_trains_under_imwa_by_configuration_alone(config, name):
    cfg = config(*COMPOSITIONS[name], "IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)
    assert run.train(cfg) == 0
    results = read_results(cfg.OUTPUT_DIR)
    assert results.method == name
    metrics = results.headline().metrics
    assert results.headline().model == "teacher"
    assert {"top1", "mean_recall", "few"} <= metrics.keys()
    assert run.evaluate(cfg) == pytest.approx(metrics)
    rows = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    recorded = set().union(*(json.loads(row) for row in rows))
    labels = {"per_image", "empty_images", "recall", "recall-3", "scores-0.9"}
    labels |= {"mask_rate", "confidence"} if name != "mean_teacher" else {"precision"}
    assert {f"labels/{x}" for x in labels} <= recorded


def test_what_is_exported_is_the_tested_head_alone(config):
    cfg = config(*COMPOSITIONS["acr"])
    run.train(cfg)
    model = trained_classifier(cfg, read_models(cfg.OUTPUT_DIR))
    weights = final_weights(cfg)
    prefix = "teacher.deployed."
    tested = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    assert_equal(model.state_dict(), tested)
    assert any(name.startswith("teacher.base_head.") for name in weights)


def test_batch_norms_are_recomputed_on_all_views(config):
    cfg = config(
        *("IMWA.MEMBERS", 2, "IMWA.BN", "recompute", "IMWA.BN_BATCHES", 1, "SOLVER.BASE_LR", 0.0)
    )
    run.train(cfg)
    task = open_task(cfg)
    reads = {"labeled": ("weak",), "unlabeled": ("weak", "strong")}
    schedule = EpisodeSchedule(2, members=2)
    batch = next(task.build_batches(schedule, torch.device("cpu"), reads)(0))
    views = [batch["labeled"].views["weak"], *batch["unlabeled"].views.values()]
    model = task.load_model(cfg.OUTPUT_DIR).train()
    stem = model.stem[0](torch.cat(views))
    expected = stem.mean((0, 2, 3))
    found = final_weights(cfg)["student.deployed.stem.1.running_mean"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("CLS.LABELER.NAME", "acr"), "'balanced' and 'acr' belong together"),
        (("CLS.FIXMATCH.SECOND_HEAD", "balanced"), "'balanced' and 'acr' belong together"),
        (("CLS.FIXMATCH.STRONG_VIEWS", 2), r"must be 3: weak, strong_1, strong_2"),
        (("CLS.LABELER.NAME", "daso", "CLS.EMA_DECAY", 0.0), "daso labels need a teacher"),
        (
            ("CLS.LABELER.NAME", "darp", "CLS.LABELER.TOTALS", [1.0]),
            "one for each of the 10 classes",
        ),
        (
            ("CLS.LABELER.NAME", "daso", "CLS.LABELER.QUEUE", 3),
            "must be at least SOLVER.IMS_PER_BATCH = 4",
        ),
        (("CLS.ALGORITHM", "mean_teacher", "CLS.EMA_DECAY", 0.0), "must be above 0"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_in_one_line(config, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run.train(config(*settings))
    assert "\n" not in str(caught.value)


def test_averages_between_two_adjustments_of_acr_are_announced(config, caplog):
    settings = (*COMPOSITIONS["acr"], "CLS.LABELER.EPOCH", 2, "IMWA.MEMBERS", 2)
    task = open_task(config(*settings, "IMWA.EPISODES", 2))
    task.build_method(torch.device("cpu"))
    assert "an episode of 1 iterations is no multiple of CLS.LABELER.EPOCH = 2" in caplog.text


@pytest.mark.parametrize("method", ["daso", "acr"])
def test_recipes_split_real_images_as_the_papers_tables_do(real_data, method):
    """N1 = 500 and M1 = 4000 at ratio 100; ACR's unlabeled images hold the labeled ones."""
    files = [CONFIGS / f"{name}.yaml" for name in (method, "real_images")]
    task = open_task(load_config(files, ["DATASETS.ROOT", str(real_data)]))
    labeled = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    unlabeled = [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]
    assert task.data.train.counts == labeled
    labeler = task.build_method(torch.device("cpu")).labeler
    if method == "acr":
        unlabeled = [n + m for n, m in zip(labeled, unlabeled, strict=True)]
        assert int((~labeler._countable).sum()) == 1236
    assert task.data.unlabeled.counts == unlabeled


def test_cossl_goes_on_from_fixmatch(config):
    first = config(output="first")
    run.train(first)
    settings = ("CLS.ALGORITHM", "cossl", "CLS.COSSL.WARMUP_ITERS", 1, *TWO_VIEWS[2:])
    with pytest.raises(ConfigError, match="must be a run of FixMatch"):
        run.train(config(*settings))
    second = config(
        *settings, "MODEL.WEIGHTS", first.OUTPUT_DIR, "IMWA.MEMBERS", 2, output="second"
    )
    assert run.train(second) == 0
    results = read_results(second.OUTPUT_DIR)
    assert results.method == "cossl"
    assert run.evaluate(second) == pytest.approx(results.headline().metrics)
