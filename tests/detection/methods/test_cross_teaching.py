"""Labels of another member's teacher (IMWA.CROSS_TEACH), for every method of detection."""

import copy
from types import SimpleNamespace

import pytest
import torch
from detection_toys import pictures, small_faster_rcnn, small_fcos

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.methods.dense_teacher import DenseTeacher, DenseTeacherOptions
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.detection.methods.soft_teacher import SoftTeacher, SoftTeacherOptions
from ssod_imwa.detection.methods.supervised import Supervised
from ssod_imwa.detection.methods.unbiased_teacher import UnbiasedTeacher, UnbiasedTeacherOptions

T = 1000  # after all burn-ins and ramps


def mean_teacher():
    return MeanTeacher(small_faster_rcnn(), MeanTeacherOptions(bbox_threshold=0.2))


def unbiased_teacher():
    options = UnbiasedTeacherOptions(burn_in_iters=0, bbox_threshold=0.2)
    return UnbiasedTeacher(small_faster_rcnn(), options)


def soft_teacher():
    thresholds = {"initial_threshold": 0.1, "rpn_threshold": 0.2, "bbox_threshold": 0.2}
    return SoftTeacher(small_faster_rcnn("FrozenBN"), SoftTeacherOptions(**thresholds, jitters=2))


def dense_teacher():
    options = DenseTeacherOptions(burn_in_iters=1, ema_start_iters=0)
    return DenseTeacher(small_fcos(), options)


METHODS = [mean_teacher, unbiased_teacher, soft_teacher, dense_teacher]


def losses(method):
    batch = pictures(0, 2)
    if isinstance(method, SoftTeacher):
        labeled = Part({"colored": batch["labeled"].views["weak"]}, None, torch.arange(2))
        batch = Batch(labeled=labeled, unlabeled=batch["unlabeled"])
    torch.manual_seed(0)  # detectors sample
    with torch.no_grad():
        return {name: value.item() for name, value in method.losses(batch, T).items()}


def another(method):
    """A teacher that sees other things than the own one."""
    other = copy.deepcopy(method.teacher.model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in other.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("build", METHODS)
def test_the_others_labels_are_those_of_a_run_that_had_its_teacher(build):
    plain, taught, replaced = build(), build(), build()
    taught.cross_teach, taught.other_teacher = "other", another(taught)
    replaced.teacher.model.load_state_dict(taught.other_teacher.state_dict())
    expected = losses(replaced)
    assert losses(taught) == expected
    assert losses(plain) != expected


@pytest.mark.parametrize("build", METHODS)
@pytest.mark.parametrize("rule", ["other", "agree"])
def test_without_another_teacher_the_own_one_labels(build, rule):
    plain, taught = build(), build()
    taught.cross_teach = rule
    assert losses(taught) == losses(plain)


@pytest.mark.parametrize("build", METHODS[:3])
def test_what_both_say_is_learned_and_what_one_says_is_not(build):
    plain, same, alone = build(), build(), build()
    for method in (same, alone):
        method.cross_teach = "agree"
        method.other_teacher = copy.deepcopy(method.teacher.model)
    expected = losses(plain)
    assert expected["pseudo_boxes"] > 0
    assert losses(same) == expected

    def nothing(images):
        empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return [Detections(*empty)] * len(images)

    silent = alone.other_teacher
    silent.detect = nothing
    silent.inference = lambda images, **options: SimpleNamespace(detections=lambda: nothing(images))
    assert losses(alone)["pseudo_boxes"] == 0


def test_rules_are_those_that_labels_allow():
    both = ("other", "agree")
    kinds = (Supervised, MeanTeacher, UnbiasedTeacher, SoftTeacher, DenseTeacher)
    assert [kind.cross_teaches for kind in kinds] == [(), both, both, both, ("other",)]
