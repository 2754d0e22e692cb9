"""Whole runs of second stages, which go on from the weights of a first one."""

import re

import pytest
import torch
import torchvision
from support import assert_equal, final_weights

from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.solver import build_task_optimizer
from ssod_imwa.runs.trained import read_trained

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("algorithm", ["erm", "ncl", "ecl"])
def test_each_experts_classifier_has_the_rate_of_classifiers(config, algorithm):
    cfg = config(
        *("CLS.ALGORITHM", algorithm, "CLS.MODEL.EXPERTS", 2, "CLS.STAGE.CLASSIFIER_LR", 0.5),
        *("CLS.INPUT.VIEWS", ["plain"] if algorithm == "erm" else ["plain", "plain"]),
    )
    task = open_task(cfg)
    student = task.build_method(torch.device("cpu")).student
    optimizer = build_task_optimizer(task, student)
    slow = [
        g["params"] for g in optimizer.param_groups if g["initial_lr"] == 0.5 * cfg.SOLVER.BASE_LR
    ]
    names = {parameter: name for name, parameter in student.named_parameters()}
    assert {names[p].rpartition("experts.")[2] for group in slow for p in group} == {
        f"{number}.classifier.{kind}" for number in range(2) for kind in ("weight", "bias")
    }


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


def test_tau_norm_refuses_a_library_file_which_brings_no_classifier(config, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    settings = ("CLS.MODEL.NAME", "torchvision:resnet18", "CLS.STAGE.TAU_NORM", 1.0)
    with pytest.raises(ConfigError, match="this file brings no classifier to normalize"):
        run.train(config(*settings, "MODEL.WEIGHTS", tmp_path / "resnet18.pth"))
