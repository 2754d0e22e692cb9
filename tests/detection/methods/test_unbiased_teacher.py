import copy
from functools import partial

import pytest
import torch
from detection_toys import (
    NAMES,
    LinearDetector,
    batch,
    check_mean_of_gradients,
    pictures,
    small_faster_rcnn,
    small_fcos,
    small_retinanet,
    train,
)
from torch.nn.parallel import DistributedDataParallel

from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.methods.unbiased_teacher import UnbiasedTeacher, UnbiasedTeacherOptions
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.pseudo_labels import as_targets, filter_detections


def unbiased_teacher(**changes):
    settings = {"burn_in_iters": 3, "ema_decay": 0.75, "unsup_loss_weight": 4.0, **changes}
    return UnbiasedTeacher(LinearDetector(), UnbiasedTeacherOptions(**settings))


def test_burn_in_trains_on_labeled_views_alone():
    method = unbiased_teacher()
    for t in range(3):
        losses = method.losses(batch(), t)
        assert tuple(losses) == NAMES
    assert method.student.calls == [([101, 102, 1, 2], [2, 2, 2, 2])] * 3


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"burn_in_iters": 0}, {0: {"labeled": 6, "unlabeled": 4}}),
        ({"burn_in_iters": 5}, {0: {"labeled": 6}, 5: {"labeled": 6, "unlabeled": 4}}),
        (
            {"burn_in_iters": 5, "strong_labeled": False},
            {0: {"labeled": 3}, 5: {"labeled": 3, "unlabeled": 4}},
        ),
    ],
)
def test_phases_announce_the_passes_over_images_of_each_stream(changes, phases):
    """Labeled views are learned (3 passes each); the teacher looks at one view of the others."""
    assert unbiased_teacher(**changes).phases() == phases


def test_after_burn_in_the_student_learns_the_teachers_boxes_on_strong_views():
    method = unbiased_teacher()
    losses = method.losses(batch(), 3)
    assert method.student.calls == [([101, 102, 1, 2], [2, 2, 2, 2]), ([190, 110], [2, 0])]
    assert set(losses) == {*NAMES, *(f"{n}_pseudo" for n in NAMES), "pseudo_boxes", "pseudo_score"}
    assert losses["pseudo_boxes"].item() == 1.0
    assert losses["pseudo_score"].item() == pytest.approx((0.90 + 0.71) / 2)


def test_pseudo_losses_are_weighted():
    unweighted = unbiased_teacher(unsup_loss_weight=1.0, unsup_box_loss_weight=1.0)
    plain = unweighted.losses(batch(), 3)
    weighted = unbiased_teacher(unsup_loss_weight=4.0, unsup_box_loss_weight=0.5).losses(batch(), 3)
    factors = {"loss_rpn_cls": 4.0, "loss_rpn_loc": 0.5, "loss_cls": 4.0, "loss_box_reg": 0.5}
    for name, factor in factors.items():
        assert weighted[name].item() == plain[name].item()
        assert weighted[f"{name}_pseudo"].item() == factor * plain[f"{name}_pseudo"].item() != 0


def test_box_losses_of_weight_0_stay_in_the_graph_and_add_nothing():
    method = unbiased_teacher()
    losses = method.losses(batch(), 3)
    for name in ("loss_rpn_loc_pseudo", "loss_box_reg_pseudo"):
        (gradient,) = torch.autograd.grad(losses[name], method.student.weight, retain_graph=True)
        assert losses[name].item() == 0
        assert gradient.tolist() == [0, 0, 0, 0]


def test_teacher_is_copied_once_and_then_follows_the_formula():
    method = unbiased_teacher()
    initial = copy.deepcopy(method.teacher.model.state_dict())
    expected = None
    for t in train(method, 10):
        student, teacher = method.student.state_dict(), method.teacher.model.state_dict()
        if t < 2:
            assert all(torch.equal(teacher[name], initial[name]) for name in initial)
            continue
        if t == 2:
            expected = {name: x.tolist() for name, x in student.items()}
            assert all(torch.equal(teacher[name], student[name]) for name in student)
            continue
        weights = zip(expected["weight"], student["weight"].tolist(), strict=True)
        expected["weight"] = [0.75 * old + 0.25 * new for old, new in weights]
        expected["mean"] = 0.75 * expected["mean"] + 0.25 * student["mean"].item()
        assert teacher["weight"].tolist() == pytest.approx(expected["weight"], rel=1e-12)
        assert teacher["mean"].item() == pytest.approx(expected["mean"], rel=1e-12)
    assert method.teacher.model.weight.tolist() != pytest.approx(method.student.weight.tolist())


def test_without_burn_in_the_teacher_starts_from_the_initial_student():
    method = unbiased_teacher(burn_in_iters=0)
    start = method.student.weight.detach().clone()
    assert torch.equal(method.teacher.model.weight, start)
    assert "loss_cls_pseudo" in method.losses(batch(), 0)
    assert list(train(method, 1)) == [0]
    expected = 0.75 * start + 0.25 * method.student.weight
    torch.testing.assert_close(method.teacher.model.weight, expected)


def test_teacher_is_ready_from_the_step_that_copies_it():
    method = unbiased_teacher()
    assert [method.teacher.ready(t) for t in range(5)] == [False, False, True, True, True]
    assert method.inference_model(1) is method.student
    assert method.inference_model(2) is method.teacher.model


def test_teacher_is_not_trained_and_stays_in_eval_mode():
    method = unbiased_teacher()
    list(train(method, 5))
    assert not method.teacher.model.training
    assert method.teacher.model.calls == []
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.model.parameters())


def test_it_reads_strong_views_of_labeled_images_only_if_it_trains_on_them():
    both = ("weak", "strong")
    assert unbiased_teacher().reads == {"labeled": both, "unlabeled": both}
    alone = unbiased_teacher(strong_labeled=False)
    assert alone.reads == {"labeled": ("weak",), "unlabeled": both}
    del (weak_alone := batch())["labeled"].views["strong"]
    assert "loss_cls_pseudo" in alone.losses(weak_alone, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"burn_in_iters": -1},
        {"ema_decay": 1.5},
        {"bbox_threshold": 1.2},
        {"unsup_loss_weight": -1.0},
        {"unsup_box_loss_weight": -1.0},
    ],
)
def test_wrong_arguments_are_refused(changes):
    with pytest.raises(ValueError, match=r"is not allowed|are not allowed|must be"):
        unbiased_teacher(**changes)


def test_batches_without_pseudo_labels_give_gradients_for_all_parameters():
    options = UnbiasedTeacherOptions(burn_in_iters=0, bbox_threshold=1.0)
    method = UnbiasedTeacher(small_faster_rcnn(), options)
    losses = method.losses(pictures(0, 1), 0)
    assert losses["pseudo_boxes"].item() == 0
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    gradients = [p.grad for p in method.student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def gradients_of_rank(rank, *, norm, parallel):
    """Gradients of one rank's batch, alone or exchanged with the other rank."""
    options = UnbiasedTeacherOptions(burn_in_iters=0, bbox_threshold=0.0)
    method = UnbiasedTeacher(small_faster_rcnn(norm), options)
    if parallel:
        method.parallel_student = DistributedDataParallel(method.student, broadcast_buffers=False)
    torch.manual_seed(rank)
    losses = method.losses(pictures(100 * rank, 1), 0)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    return {name: p.grad.clone() for name, p in method.student.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_two_forward_passes_under_ddp_average_the_ranks_gradients(tmp_path, norm):
    check_mean_of_gradients(partial(gradients_of_rank, norm=norm), tmp_path)


@pytest.mark.parametrize(
    ("build", "box_losses"),
    [(small_fcos, {"loss_box_reg", "loss_quality"}), (small_retinanet, {"loss_box_reg"})],
)
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["pseudo-labels", "none"])
def test_dense_detectors_learn_the_classes_of_pseudo_labels(build, box_losses, threshold):
    settings = UnbiasedTeacherOptions(
        burn_in_iters=0, bbox_threshold=threshold, unsup_loss_weight=3.0
    )
    method = UnbiasedTeacher(build(), settings)
    labels = [
        Detections(torch.tensor([[8.0, 8.0, 50.0, 60.0]]), torch.tensor([2]), torch.tensor([0.9]))
    ]
    method.teacher.model.detect = lambda images: labels * len(images)
    batch = pictures(0, 1)
    losses = method.losses(batch, 0)
    assert losses["pseudo_boxes"].item() == (1 if threshold == 0 else 0)
    expected = method.student(
        [view.image for view in batch["unlabeled"].views["strong"]],
        SupervisedLoss([as_targets(filter_detections(labels[0], threshold))]),
    )
    assert expected.keys() == {"loss_cls", *box_losses}
    # Batch norms of the student have moved since, but train on the batch's own statistics.
    assert losses["loss_cls_pseudo"].item() == pytest.approx(3 * expected["loss_cls"].item())
    assert losses["loss_cls_pseudo"] > 0
    for name in box_losses:
        assert losses[f"{name}_pseudo"].item() == 0
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    gradients = [p.grad for p in method.student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
