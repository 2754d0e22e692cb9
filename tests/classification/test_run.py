"""Whole classification runs, on long-tailed digits with tiny networks."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from support import assert_equal, final_weights, mean_of

from ssod_imwa.analysis.build import open_run
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification import build, task
from ssod_imwa.classification.data.subsets import balanced_subset
from ssod_imwa.classification.export import trained_classifier
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.hooks import LRHook
from ssod_imwa.errors import ConfigError, DataError, UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.trained import read_trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    """A function that loads a run of seconds, changed by KEY VALUE pairs."""

    def load(*overrides, output="run"):
        settings = {
            "TASK": "classification",
            "OUTPUT_DIR": tmp_path / output,
            "DATASETS.TRAIN": ["digit_images_train"],
            "DATASETS.TEST": ["digit_images_test"],
            "CLS.MODEL.NAME": "cifar_resnet20",
            "CLS.IMBALANCE.RATIO": 20,
            "CLS.INPUT.FLIP": False,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.BASE_LR": 0.1,
            "SOLVER.WARMUP_ITERS": 1,
            "SOLVER.IMS_PER_BATCH": 16,
            "TEST.IMS_PER_BATCH": 128,
            "LOG_PERIOD": 1,
        }
        pairs = [str(x) for pair in settings.items() for x in pair]
        return load_config(overrides=[*pairs, *map(str, overrides)])

    return load


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


def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(config, monkeypatch):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "CLS.MIX.KIND", "mfw")
    settings += ("CLS.MIX.LAYERS", ["layer3"], "CLS.EMA_DECAY", 0.9)
    whole, parts = config(*settings, output="whole"), config(*settings, output="parts")
    run.train(whole)
    before_step = LRHook.before_step

    def interrupted(hook):
        before_step(hook)
        if hook.trainer.iter == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LRHook, "before_step", interrupted)
        assert run.train(parts) == 128 + signal.SIGTERM
    assert run.train(parts, resume_from=True) == 0
    assert_equal(final_weights(whole), final_weights(parts))
    first, second = (read_results(cfg.OUTPUT_DIR).evaluations for cfg in (whole, parts))
    assert str(first) == str(second)


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


def test_a_second_stage_starts_from_the_first_and_trains_its_part_alone(config):
    first = config(output="first")
    run.train(first)
    second = config(
        *("MODEL.WEIGHTS", first.OUTPUT_DIR, "CLS.STAGE.PART", "classifier"),
        *("CLS.STAGE.RESET_CLASSIFIER", True, "CLS.SAMPLER.NAME", "class"),
        output="second",
    )
    run.train(second)
    before, after = final_weights(first), final_weights(second)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"student.classifier.weight", "student.classifier.bias"}


def test_learnable_scales_are_all_that_lws_trains(config):
    first = config(output="first")
    run.train(first)
    second = config(
        *("MODEL.WEIGHTS", first.OUTPUT_DIR, "CLS.STAGE.PART", "scale"),
        *("CLS.STAGE.LEARNABLE_SCALE", True, "CLS.SAMPLER.NAME", "class"),
        output="second",
    )
    run.train(second)
    before, after = final_weights(first), final_weights(second)
    assert torch.equal(
        before["student.classifier.weight"], after["student.classifier.classifier.weight"]
    )
    assert not torch.equal(after["student.classifier.scale"], torch.ones(10))


def test_a_run_goes_on_from_a_stage_with_scales_by_folding_them(config):
    scaled = config("CLS.STAGE.LEARNABLE_SCALE", "True")
    run.train(scaled)
    before = read_trained(scaled.OUTPUT_DIR).weights
    scale = before["classifier.scale"]
    assert not scale.eq(1).all()
    # A rate of 0 leaves the weights that the run started from.
    after = config("MODEL.WEIGHTS", scaled.OUTPUT_DIR, "SOLVER.BASE_LR", "0", output="next")
    run.train(after)
    weights = read_trained(after.OUTPUT_DIR).weights
    inner = "classifier.classifier."
    assert weights["classifier.weight"].equal(scale[:, None] * before[f"{inner}weight"])
    assert weights["classifier.bias"].equal(scale * before[f"{inner}bias"])


def test_tau_norm_is_the_first_stage_with_normalized_weights_and_no_bias(config):
    first = config(output="first")
    run.train(first)
    second = config(
        *("MODEL.WEIGHTS", first.OUTPUT_DIR, "CLS.STAGE.TAU_NORM", 0.6),
        *("CLS.STAGE.PART", "classifier", "SOLVER.BASE_LR", 0, "SOLVER.MAX_ITER", 1),
        output="second",
    )
    run.train(second)
    before, after = final_weights(first), final_weights(second)
    expected = before["student.classifier.weight"].double()
    for c, row in enumerate(expected):
        expected[c] = row / sum(float(x) ** 2 for x in row) ** (0.6 / 2)
    torch.testing.assert_close(after.pop("student.classifier.weight"), expected.float())
    assert not after.pop("student.classifier.bias").any()
    assert_equal(after, {name: before[name] for name in after})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), "MODEL.WEIGHTS = '' is not allowed with CLS.STAGE.TAU_NORM"),
        (("CLS.MODEL.CLASSIFIER", "cosine"), "unless CLS.MODEL.CLASSIFIER is linear"),
        (("CLS.STAGE.RESET_CLASSIFIER", True), "a new classifier has nothing to normalize"),
    ],
)
def test_tau_norm_needs_a_trained_linear_classifier(config, changes, message):
    weights = ()
    if changes:
        first = config(*changes, output="first")
        run.train(first)
        weights = ("MODEL.WEIGHTS", first.OUTPUT_DIR)
    with pytest.raises(ConfigError, match=re.escape(message)):
        run.train(config("CLS.STAGE.TAU_NORM", 1.0, *changes, *weights))


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


# ------------------------------------------------------------------------------------ bad records


@pytest.fixture
def files(config, tmp_path, write_image):
    """A run on two classes of images in files, the second of which is rare."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png", width=32, height=32)

    def load(*overrides):
        return config(
            *("DATASETS.ROOT", tmp_path, "CLS.IMBALANCE.RATIO", 0, "SOLVER.IMS_PER_BATCH", 4),
            *("DATASETS.TRAIN", "['folder:train']", "DATASETS.TEST", "['folder:test']"),
            *("CLS.INPUT.VIEWS", "['test']", "CLS.INPUT.SIZE", 32, "DATALOADER.NUM_WORKERS", 0),
            *overrides,
        )

    return load


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_a_test_image_that_is_cut_off_stops_the_run_before_it_trains(files, tmp_path):
    cut_off(tmp_path / "test" / "dog" / "1.png")
    cfg = files("DATASETS.ON_BAD_RECORD", "skip")
    with pytest.raises(DataError, match=r"data set folder:test cannot be read: image .*dog/1\.png"):
        run.train(cfg)
    assert not os.path.exists(cfg.OUTPUT_DIR)


@pytest.mark.parametrize("in_memory", [False, True])
def test_unreadable_training_images_stop_the_run_or_are_replaced(
    files, tmp_path, caplog, in_memory
):
    cut_off(tmp_path / "train" / "cat" / "2.png")
    settings = ["CLS.INPUT.IN_MEMORY", in_memory]
    settings += ["CLS.INPUT.VIEWS", "['none']"] if in_memory else []
    with pytest.raises(DataError, match=r"cat/2\.png cannot be read"):
        run.train(files(*settings))
    cfg = files(*settings, "DATASETS.ON_BAD_RECORD", "skip")
    caplog.clear()
    assert run.train(cfg, overwrite=True) == 0
    assert len([line for line in caplog.messages if "cat/2.png" in line]) == 1


def test_what_looks_at_training_images_leaves_unreadable_ones_out(files, tmp_path, caplog):
    """Class tracking, BTM's merging by the members' images, and the analysis of the run."""
    cut_off(tmp_path / "train" / "cat" / "2.png")
    settings = ["CLS.TRACK_PERIOD", 4, *MERGED, "CLS.SAMPLER.PER_CLASS", 4, "IMWA.MEMBERS", 2]
    with pytest.raises(DataError, match=r"cat/2\.png cannot be read"):
        run.train(files(*settings))
    cfg = files(*settings, "DATASETS.ON_BAD_RECORD", "skip")
    assert run.train(cfg, overwrite=True) == 0
    lines = Path(cfg.OUTPUT_DIR, "classes.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["member"] for row in rows] == [0, 1]
    # 7 images: 3 cats that can be read and 4 dogs, each predicted as one of them.
    cats, dogs = rows[-1]["ratio"]
    assert cats * 3 + dogs * 4 == pytest.approx(7, abs=1e-4)
    assert any("cat/2.png" in line and "is left out" in line for line in caplog.messages)
    extracted = open_run(cfg.OUTPUT_DIR).extract_train()
    assert extracted.labels.tolist() == [0] * 3 + [1] * 4


def test_a_class_that_is_not_tested_has_no_figures_and_leaves_the_means_alone(files, tmp_path):
    shutil.rmtree(tmp_path / "test" / "dog")
    for i in range(20):
        shutil.copy(tmp_path / "train/dog/0.png", tmp_path / "train" / "dog" / f"more{i}.png")
    cfg = files()
    run.train(cfg)
    metrics = read_results(cfg.OUTPUT_DIR).headline().metrics
    assert math.isnan(metrics["recall-dog"])
    assert math.isnan(metrics["medium"])
    assert metrics["few"] == metrics["top1"] == metrics["recall-cat"]
    text = Path(cfg.OUTPUT_DIR, "results.json").read_text()
    assert '"recall-dog": null' in text


# -------------------------------------------------------------------------------------- bad input

MERGED = ("CLS.SAMPLER.NAME", "balanced_subset", "CLS.MERGE", "greedy_h")
VIT = ("CLS.MODEL.NAME", "vit_tiny_patch4_32")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["DATASETS.TRAIN", "['digits_train']"], DataError, "did you mean digit_images_train"),
        (["DATASETS.TRAIN", "[]"], ConfigError, "must name one data set"),
        (["DATASETS.TEST", "[]"], ConfigError, "DATASETS.TEST"),
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
        (["MODEL.WEIGHTS", "absent"], UserError, "absent"),
        ([*MERGED, "IMWA.STORE", "stream"], ConfigError, "must be 'dict'"),
        ([*MERGED, "IMWA.COEFFICIENTS", [1.0]], ConfigError, "it weighs members itself"),
        (["CLS.ALGORITHM", "mae"], ConfigError, "must be a vision transformer"),
        (["CLS.ALGORITHM", "mae", *VIT, "MODEL.WEIGHTS", "absent"], ConfigError, "draws its w"),
        ([*VIT, "CLS.STAGE.LAYER_DECAY", 0.5, "CLS.MODEL.EXPERTS", 2], ConfigError, "several ex"),
        (["CLS.STAGE.LEARNABLE_SCALE", True, "CLS.MODEL.EXPERTS", 2], ConfigError, "several exp"),
    ],
)  # fmt: skip
def test_bad_input_stops_before_anything_is_written(config, settings, error, message):
    cfg = config(*settings)
    with pytest.raises(error, match=message) as caught:
        run.train(cfg)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))


# -------------------------------------------------------------------------------------- compiling


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs that torch.compile captures, which run as they are: nothing is generated."""
    graphs, torch_compile = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda x, mode=None: torch_compile(x, backend=keep))
    yield graphs
    torch.compiler.reset()


def test_a_compiled_run_trains_and_saves_the_plain_network(config, compiled_graphs):
    settings = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "CLS.EMA_DECAY", 0.9)
    plain = config(*settings, output="plain")
    compiled = config(*settings, "CLS.MODEL.COMPILE", "default", output="compiled")
    run.train(plain)
    assert not compiled_graphs
    run.train(compiled)
    # The trial, and one for all members, episodes and evaluations.
    assert len(compiled_graphs) == 2
    assert_equal(final_weights(plain), final_weights(compiled))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_differs_by_rounding(config):
    settings = ("SOLVER.MAX_ITER", 2, "SOLVER.BASE_LR", 0.01)
    plain = config(*settings, output="plain")
    compiled = config(*settings, "CLS.MODEL.COMPILE", "default", output="compiled")
    for cfg in (plain, compiled):
        run.train(cfg)
    expected, found = final_weights(plain), final_weights(compiled)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["mfw", "manifold"])
def test_mixing_inside_a_compiled_network_is_refused(config, kind):
    cfg = config(
        *("CLS.MODEL.COMPILE", "default", "CLS.MIX.KIND", kind, "CLS.MIX.LAYERS", ["layer3"])
    )
    message = f"CLS.MODEL.COMPILE = 'default' is not allowed with CLS.MIX.KIND = '{kind}'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        run.train(cfg)


def test_a_machine_without_compiler_is_told_in_one_line(config, monkeypatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch.compiler.reset()
    with pytest.raises(ConfigError, match=r"nothing can be compiled here \(.+\)$") as caught:
        run.train(config("CLS.MODEL.COMPILE", "default"))
    assert "\n" not in str(caught.value)
