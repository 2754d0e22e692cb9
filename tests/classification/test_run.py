"""Whole classification runs, on long-tailed digits with tiny networks."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from support import assert_equal, final_weights, mean_of, train_in_parts

from ssod_imwa.analysis.snapshots import last_students
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification import build, task
from ssod_imwa.classification.data.subsets import balanced_subset
from ssod_imwa.classification.export import trained_classifier
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.errors import ConfigError, DataError, UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.trained import read_trained

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_results_in_percent_that_evaluation_repeats(config):
    cfg = config("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "CLS.EMA_DECAY", 0.9)
    assert run.train(cfg) == 0
    results = read_results(cfg.OUTPUT_DIR)
    assert (results.task, results.method) == ("classification", "cross_entropy")
    stages = [(x.model, x.stage) for x in results.evaluations]
    models = ("student", "teacher")
    assert stages == [(model, stage) for stage in ("average", "final") for model in models]
    found = results.headline().metrics
    assert {"top1", "top5", "many", "medium", "few", "h_mean", "recall-9", "ece"} <= found.keys()
    assert run.evaluate(cfg) == pytest.approx(found)
    assert read_models(cfg.OUTPUT_DIR).content["stored_size"] == 32


def test_nesterovs_first_step_is_longer_by_the_momentum(config):
    def bias(rate, nesterov):
        settings = ("SOLVER.BASE_LR", rate, "SOLVER.NESTEROV", nesterov)
        cfg = config(*settings, "SOLVER.MAX_ITER", 1, output=f"{rate}_{nesterov}")
        run.train(cfg)
        return final_weights(cfg)["student.classifier.bias"].double()

    start = bias(0.0, False)
    plain, looking_ahead = (bias(100.0, nesterov) - start for nesterov in (False, True))
    torch.testing.assert_close(looking_ahead, 1.9 * plain, rtol=1e-4, atol=1e-6)


def test_one_member_is_plain_training_whatever_the_episodes(config):
    plain, cut = config(output="plain"), config("IMWA.EPISODES", 3, output="cut")
    for cfg in (plain, cut):
        run.train(cfg)
    assert_equal(final_weights(plain), final_weights(cut))


@pytest.mark.parametrize("sampler", ["instance", "balanced_subset"])
def test_one_episode_is_the_mean_of_separate_runs(config, sampler):
    settings = ("CLS.SAMPLER.NAME", sampler)
    if sampler == "balanced_subset":
        settings += ("CLS.SAMPLER.PER_CLASS", 5)
    together = config(*settings, "IMWA.MEMBERS", 2, output="together")
    alone = [config(*settings, "IMWA.FIRST_MEMBER", m, output=f"member{m}") for m in range(2)]
    for cfg in (together, *alone):
        run.train(cfg)
    first, second = (final_weights(cfg) for cfg in alone)
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert_equal(final_weights(together), mean_of(first, second))


def test_one_balanced_subset_is_fine_tuning_on_its_images(config, monkeypatch):
    first = config(output="first")
    run.train(first)
    settings = ("MODEL.WEIGHTS", first.OUTPUT_DIR, "SOLVER.MAX_ITER", 7)
    merged = config(
        *settings, "CLS.SAMPLER.NAME", "balanced_subset", "CLS.SAMPLER.PER_CLASS", 5, output="btm"
    )
    run.train(merged)
    build_data = task.build_data

    def subset_alone(cfg):
        data = build_data(cfg)
        positions = build.member_subset(merged, data.train, 0)
        return replace(data, train=data.train.subset(positions))

    monkeypatch.setattr(task, "build_data", subset_alone)
    tuned = config(*settings, output="tuned")
    run.train(tuned)
    assert_equal(final_weights(merged), final_weights(tuned))


def test_a_merged_model_costs_what_one_costs(config):
    one = config("SOLVER.MAX_ITER", 1, output="one")
    merged = config("SOLVER.MAX_ITER", 1, "IMWA.MEMBERS", 3, output="merged")
    costs = []
    for cfg in (one, merged):
        run.train(cfg)
        model = open_task(cfg).load_model(cfg.OUTPUT_DIR).eval()
        flops = FlopCountAnalysis(model, torch.zeros(1, 3, 32, 32))
        flops.unsupported_ops_warnings(False)
        shapes = {name: x.shape for name, x in model.state_dict().items()}
        costs.append((flops.total(), shapes))
    assert costs[0] == costs[1]


def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(config):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "CLS.MIX.KIND", "mfw")
    settings += ("CLS.MIX.LAYERS", ["layer3"], "CLS.EMA_DECAY", 0.9)
    whole, parts = config(*settings, output="whole"), config(*settings, output="parts")
    run.train(whole)
    train_in_parts(parts, 3)
    assert_equal(final_weights(whole), final_weights(parts))
    first, second = (read_results(cfg.OUTPUT_DIR).evaluations for cfg in (whole, parts))
    assert str(first) == str(second)


def test_overwriting_removes_what_the_new_run_does_not_write_anew(config):
    cfg = config("CLS.SNAPSHOT_PERIOD", 1, "CLS.TRACK_PERIOD", 1)
    assert run.train(cfg) == 0
    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "classes.json").exists()
    assert len(last_students(folder, 5)) > 2
    assert run.train(config("SEED", 2), overwrite=True) == 0
    assert not (folder / "classes.json").exists()
    assert not list((folder / "snapshots").iterdir())


def test_a_schedule_in_epochs_counts_the_images_that_are_sampled(config):
    # 478 images at ratio 20, in batches of 16: 29.875 iterations an epoch.
    cfg = config("CLS.SCHEDULE.EPOCHS", 0.1, "CLS.SCHEDULE.STEPS", [0.05], "CLS.SCHEDULE.WARMUP", 0)
    run.train(cfg)
    assert read_results(cfg.OUTPUT_DIR).iterations == 3
    cfg = read_trained(cfg.OUTPUT_DIR).config
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (3, [1], 0)


def test_a_member_trains_on_the_union_of_its_subsets(config):
    """BTM's observation: an epoch is a pass over all of its images, and over no others."""
    cfg = config(
        *("CLS.SAMPLER.NAME", "balanced_subset", "CLS.SAMPLER.PER_CLASS", 10),
        *("CLS.SAMPLER.SUBSETS", 2, "CLS.SCHEDULE.EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 1),
    )
    made = open_task(cfg)
    train = made.data.train
    subsets = [
        set(balanced_subset(train.labels, 10, 10, seed=cfg.SEED, number=n).tolist()) for n in (0, 1)
    ]
    union = subsets[0] | subsets[1]
    assert len(subsets[0]) < len(union) == made.cfg.SOLVER.MAX_ITER
    batches = made.build_batches(
        EpisodeSchedule(len(union)), torch.device("cpu"), {"labeled": ("image",)}
    )
    read = [int(batch["labeled"].indices) for batch in batches(0)]
    assert sorted(read) == sorted(union)


def test_mirror_images_are_judged_beside_the_images(config):
    cfg = config("TEST.FLIP", True, "CLS.EMA_DECAY", 0.9, "IMWA.MEMBERS", 2, "IMWA.EPISODES", 2)
    run.train(cfg)
    for evaluation in read_results(cfg.OUTPUT_DIR).evaluations:
        names = {name for name in evaluation.metrics if not name.startswith("recall-")}
        flipped = {name.removeprefix("flipped/") for name in names if name.startswith("flipped/")}
        assert flipped == {name for name in names if not name.startswith("flipped/")}
        assert {"top1", "h_mean", "ece"} <= flipped


@pytest.mark.parametrize("name", ["cifar_resnet20", "wrn_28_2", "resnet18"])
def test_convolutions_see_the_channels_of_a_pixel_side_by_side(config, name):
    task = open_task(config("CLS.MODEL.NAME", name))
    student = task.build_method(torch.device("cpu")).student
    layouts = {}

    def note(module, inputs, output):
        layouts[module] = output.is_contiguous(memory_format=torch.channels_last)

    for module in student.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        student(torch.rand(2, 3, 32, 32))
    assert layouts
    assert all(layouts.values())


def test_what_is_trained_is_said_at_the_start(config, caplog):
    caplog.set_level("INFO")
    cfg = config("SOLVER.MAX_ITER", 2, "IMWA.EPISODES", 1)
    run.train(cfg)
    first = next(i for i, line in enumerate(caplog.messages) if line.startswith("classification:"))
    start = caplog.messages[first : first + 6]
    assert start == [
        "classification: cross_entropy on digit_images_train at ratio 20, tested on "
        "digit_images_test",
        "images: 478 labeled, 364 tested",
        "classes: 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)",
        "device: cpu (1 thread)",
        "schedule: 2 iterations in 1 episode; 16 images an iteration",
        f"output folder: {cfg.OUTPUT_DIR}",
    ]


def test_a_class_smaller_than_a_balanced_subset_is_named(config, caplog):
    caplog.set_level("INFO")
    run.train(config("CLS.SAMPLER.NAME", "balanced_subset", "CLS.SAMPLER.PER_CLASS", 8))
    # At ratio 20 class 9 has 7 images.
    assert "1 of 10 classes have fewer than CLS.SAMPLER.PER_CLASS = 8 images" in caplog.text
    assert "9 (7)" in caplog.text


@pytest.mark.parametrize("merge", ["adaptive_h", "greedy_g"])
def test_members_are_merged_by_their_means_on_balanced_images(config, merge, tmp_path):
    cfg = config(
        *("IMWA.MEMBERS", 2, "CLS.SAMPLER.NAME", "balanced_subset", "CLS.MERGE", merge),
        *("CLS.SAMPLER.PER_CLASS", 5),
    )
    run.train(cfg)
    assert read_results(cfg.OUTPUT_DIR).headline().metrics["h_mean"] >= 0


@pytest.mark.parametrize("method", ["ecl", "ncl"])
def test_one_expert_is_trained_evaluated_and_exported_alone(config, method, tmp_path):
    """A point of ECL's figure 4."""
    settings = ("CLS.ALGORITHM", method, "CLS.INPUT.VIEWS", "['sim', 'sim']", "CLS.MOCO.QUEUE", 32)
    cfg = config(*settings, "CLS.EMA_DECAY", 0.9, "IMWA.MEMBERS", 2)
    run.train(cfg)
    metrics = read_results(cfg.OUTPUT_DIR).headline().metrics
    assert metrics["expert1/top1"] == metrics["experts/top1"] == metrics["top1"]
    model = trained_classifier(cfg, read_models(cfg.OUTPUT_DIR))
    state = {k: v for k, v in final_weights(cfg).items() if k.startswith("teacher.deployed.")}
    names = [k.removeprefix("teacher.deployed.experts.0.") for k in state]
    assert_equal(model.state_dict(), dict(zip(names, state.values(), strict=True)))


def test_batch_norms_are_recomputed_with_frozen_experts_beside_a_key_network(config):
    cfg = config(
        *("CLS.ALGORITHM", "ecl", "CLS.INPUT.VIEWS", "['sim', 'sim']", "CLS.MOCO.QUEUE", 32),
        *("IMWA.MEMBERS", 2, "IMWA.BN", "recompute", "CLS.STAGE.PART", "classifier"),
    )
    assert run.train(cfg) == 0


# -------------------------------------------------------------------------------------- bad input

MERGED = ("CLS.SAMPLER.NAME", "balanced_subset", "CLS.MERGE", "greedy_h")
ECL = ("CLS.ALGORITHM", "ecl", "CLS.INPUT.VIEWS", "['sim', 'sim']")
PACO = ("CLS.ALGORITHM", "paco", "CLS.INPUT.VIEWS", "['plain', 'plain']")
VIT = ("CLS.MODEL.NAME", "vit_tiny_patch4_32")
DECAYED = (*VIT, "CLS.STAGE.LAYER_DECAY", 0.5)
BLOCK = ("CLS.STAGE.PART", "last_block")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["DATASETS.TRAIN", "['digits_train']"], DataError, "did you mean digit_images_train"),
        (["DATASETS.TRAIN", "[]"], ConfigError, "must name one data set"),
        (["DATASETS.TEST", "[]"], ConfigError, "DATASETS.TEST"),
        (["MODEL.PIXEL_MEAN", "[1, 2]"], ConfigError, "MODEL.PIXEL_MEAN = .*must have 3 values"),
        (["CLS.INPUT.TEST_RESIZE", "bicubic"], ConfigError, "TEST_RESIZE = 'bicubic' has no mean"),
        (["CLS.IMBALANCE.RATIO", 500], DataError, "ratio = 500"),
        (["CLS.IMBALANCE.MAXIMUM", 10], DataError, "without images"),
        (["CLS.INPUT.VIEWS", "['plain', 'plain']"], ConfigError, "must be 1"),
        (["CLS.INPUT.VIEWS", "['plane']"], ConfigError, "CLS.INPUT"),
        (["CLS.MODEL.SHARED_GROUPS", 1], ConfigError, "CLS.MODEL: shared_groups = 1"),
        (["CLS.MIX.KIND", "mfw", "CLS.MIX.LAYERS", "['layer9']"], ConfigError, "layer9"),
        (["CLS.MIX.KIND", "mixup", "CLS.LOSS.NAME", "gml"], ConfigError, "mixes labels"),
        (["CLS.LOSS.NAME", "ldam"], ConfigError, "CLS.MODEL.CLASSIFIER cosine"),
        (["CLS.SCHEDULE.EPOCHS", 0.001], ConfigError, "0 iterations"),
        (["CLS.STAGE.PART", "scale"], ConfigError, "ScaledClassifier"),
        ([*PACO, "CLS.PACO.QUEUE", 3], ConfigError, "CLS.PACO.QUEUE = 3 is not allowed"),
        ([*ECL, "CLS.MOCO.QUEUE", 3], ConfigError, "CLS.MOCO.QUEUE = 3 is not allowed"),
        (["MODEL.WEIGHTS", "absent"], UserError, "absent"),
        ([*MERGED, "IMWA.STORE", "stream"], ConfigError, "must be 'dict'"),
        ([*MERGED, "IMWA.COEFFICIENTS", [1.0]], ConfigError, "it weighs members itself"),
        (["CLS.ALGORITHM", "mae"], ConfigError, "must be a vision transformer"),
        (["CLS.ALGORITHM", "mae", *VIT, "MODEL.WEIGHTS", "absent"], ConfigError, "draws its w"),
        ([*VIT, "CLS.STAGE.LAYER_DECAY", 0.5, "CLS.MODEL.EXPERTS", 2], ConfigError, "several ex"),
        (["CLS.STAGE.LEARNABLE_SCALE", True, "CLS.MODEL.EXPERTS", 2], ConfigError, "several exp"),
        ([*DECAYED, "CLS.STAGE.CLASSIFIER_LR", 0.1], ConfigError, "_LR = 0.1 is not .* 1.0"),
        ([*DECAYED, "SOLVER.WEIGHT_DECAY_NORM", 0.1], ConfigError, "_NORM = 0.1 is not .* 0.0"),
        ([*BLOCK, "CLS.STAGE.MOVE_STATISTICS", "last_block"], ConfigError, "norms move anyway"),
    ],
)  # fmt: skip
def test_bad_input_stops_before_anything_is_written(config, settings, error, message):
    cfg = config(*settings)
    with pytest.raises(error, match=message) as caught:
        run.train(cfg)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
