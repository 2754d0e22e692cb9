import math

import pytest
import torch
from detection_toys import (
    NAMES,
    LinearDetector,
    batch,
    pictures,
    small_faster_rcnn,
    small_fcos,
    small_retinanet,
    train,
)

from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions


def mean_teacher(**changes):
    settings = {"ema_decay": 0.75, "rampup_iters": 10, "unsup_loss_weight": 2.0, **changes}
    return MeanTeacher(LinearDetector(), MeanTeacherOptions(**settings))


def test_the_student_learns_the_teachers_boxes_on_strong_views():
    method = mean_teacher()
    losses = method.losses(batch(), 0)
    assert method.student.calls == [([101, 102, 1, 2], [2, 2, 2, 2]), ([190, 110], [2, 0])]
    assert set(losses) == {*NAMES, *(f"{n}_pseudo" for n in NAMES), "pseudo_boxes", "pseudo_score"}
    assert losses["pseudo_boxes"].item() == 1.0


@pytest.mark.parametrize("t", [0, 1, 5, 10, 1000])
def test_the_weight_of_pseudo_labels_rises_as_a_gaussian(t):
    """w exp(-5 (1 - t / 10)^2), constant from iteration 10 on."""
    method = mean_teacher()
    losses = method.losses(batch(), t)
    weight = 2.0 * math.exp(-5 * max(0.0, 1 - t / 10) ** 2)
    # The strong views are 190 and 110 bright with two boxes; the mean of both is 150.
    for name, w in zip(NAMES, (1.0, 2.0, 3.0, 4.0), strict=True):
        brightness = sum(x.double().mean().item() for x in strong_images()) / 2
        expected = weight * (w - brightness - 2) ** 2
        assert losses[f"{name}_pseudo"].item() == pytest.approx(expected)


def strong_images():
    return [view.image for view in batch()["unlabeled"].views["strong"]]


def test_the_teacher_is_the_mean_of_the_first_students_then_an_average():
    method = mean_teacher()
    expected = method.student.weight.detach().clone()
    for t in train(method, 8):
        decay = min(0.75, 1 - 1 / (t + 1))
        expected = decay * expected + (1 - decay) * method.student.weight.detach()
        torch.testing.assert_close(method.teacher.model.weight, expected)
        assert method.inference_model(t) is method.teacher.model


def test_strong_views_of_labeled_images_are_an_option():
    both = ("weak", "strong")
    assert mean_teacher().reads == {"labeled": both, "unlabeled": both}
    alone = mean_teacher(strong_labeled=False)
    assert alone.reads == {"labeled": ("weak",), "unlabeled": both}


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("build", [small_faster_rcnn, small_fcos, small_retinanet])
def test_any_detector_trains_all_parameters_with_and_without_pseudo_labels(build, threshold):
    method = MeanTeacher(build(), MeanTeacherOptions(bbox_threshold=threshold))
    labels = Detections(
        torch.tensor([[8.0, 8.0, 50.0, 60.0]]), torch.tensor([2]), torch.tensor([0.9])
    )
    method.teacher.model.detect = lambda images: [labels] * len(images)
    losses = method.losses(pictures(0, 1), 1000)
    assert (losses["pseudo_boxes"].item() > 0) == (threshold == 0.0)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    gradients = [p.grad for p in method.student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
