"""Soft Teacher against a reference in plain loops, and each of its switches."""

import copy

import pytest
import torch
from detection_toys import check_mean_of_gradients
from soft_teacher_loops import CLASSES, Reference, Toy, noise_of, soft_teacher, toy_batch
from support import detector_options
from torch.nn.parallel import DistributedDataParallel

from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Detections, Targets, View
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.methods.soft_teacher import (
    SoftTeacher,
    SoftTeacherLoss,
    SoftTeacherOptions,
)
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.errors import ConfigError

RPN, ROI = ("loss_rpn_cls", "loss_rpn_loc"), ("loss_cls", "loss_box_reg")
WATCHED = {
    *("pseudo_boxes", "pseudo_score", "pseudo_boxes_refined", "pseudo_deviation"),
    "background_weight",
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("images", "found"), [(1, 6), (4, 5), (3, 0)])
def test_all_losses_and_labels_are_those_of_plain_loops(seed, images, found):
    method = soft_teacher(jitters=4)
    batch = toy_batch(method, seed, images, found)
    expected = Reference(method, batch, noise_of(method, seed)).losses()
    torch.manual_seed(seed)
    losses = method.losses(batch, 0)
    assert set(losses) == {"loss_cls", *(f"{name}_pseudo" for name in (*RPN, *ROI)), *WATCHED}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_batches_of_that_test_have_labels_of_every_kind():
    """Else it would compare nothing."""
    sums, all_deviations = dict.fromkeys(("proposed", "classified", "refined"), 0), []
    for seed in range(6):
        method = soft_teacher(jitters=4)
        batch = toy_batch(method, seed, 4, 5)
        kinds, deviations = Reference(method, batch, noise_of(method, seed)).labels()
        for name, items in kinds.items():
            sums[name] += sum(map(len, items))
        all_deviations += deviations
    assert min(sums.values()) > 5
    assert min(all_deviations) < soft_teacher().options.box_deviation < max(all_deviations)


# ------------------------------------------------------------------------------------- filters


def learned_by(method, batch, seed=0):
    """The labels of the student's three losses."""
    objectives = []
    method.parallel_student = lambda images, objective: (
        objectives.append(objective) or method.student(images, objective)
    )
    torch.manual_seed(seed)
    losses = method.losses(batch, 0)
    return objectives[-1], losses


@pytest.mark.parametrize(
    ("score", "proposed", "classified"), [(0.5, 0, 0), (0.9, 0, 0), (0.91, 1, 1), (0.6, 0, 0)]
)
def test_thresholds_are_strict(score, proposed, classified):
    method = soft_teacher()
    batch = toy_batch(method, 0, 1, 0)
    box = torch.tensor([[20.0, 20.0, 50.0, 40.0]])
    found = Detections(box, torch.tensor([1]), torch.tensor([score], dtype=torch.float64))
    method.teacher.model.found[0] = found
    learned, losses = learned_by(method, batch)
    assert [len(x) for x in learned.proposed] == [proposed]
    assert [len(x) for x in learned.classified] == [classified]
    assert (losses["pseudo_deviation"] > 0) == (score > 0.5)


def test_each_loss_has_a_threshold_of_its_own():
    method = soft_teacher(rpn_threshold=0.95, bbox_threshold=0.65, box_deviation=100.0)
    batch = toy_batch(method, 0, 1, 0)
    boxes = torch.tensor([[20.0, 20.0, 50.0, 40.0]]).repeat(3, 1) + torch.arange(3.0)[:, None]
    method.teacher.model.found[0] = Detections(
        boxes, torch.tensor([0, 1, 2]), torch.tensor([0.6, 0.8, 0.99])
    )
    learned, _ = learned_by(method, batch)
    assert learned.proposed[0].labels.tolist() == [2]
    assert learned.classified[0].labels.tolist() == [1, 2]
    assert learned.refined[0].labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("smallest", "left"), [(0.0, [0, 1, 2]), (0.01, [1, 2]), (4.0, [2])])
def test_boxes_not_larger_than_the_smallest_are_left_out(smallest, left):
    method = soft_teacher(min_box_size=smallest, box_deviation=100.0)
    batch = toy_batch(method, 0, 1, 0)
    (weak,) = batch["unlabeled"].views["weak"]
    batch["unlabeled"].views["strong"] = [weak]
    x = torch.tensor([0.005, 3.0, 20.0])
    boxes = torch.stack([torch.full((3,), 20.0), torch.full((3,), 20.0), 20 + x, 20 + 2 * x], 1)
    method.teacher.model.found[0] = Detections(boxes, torch.arange(3), torch.full((3,), 0.95))
    learned, _ = learned_by(method, batch)
    for labels in (learned.proposed, learned.classified, learned.refined):
        assert labels[0].labels.tolist() == left


def test_all_background_weighs_alike_if_it_is_not_soft():
    weights = {}
    for soft in (True, False):
        method = soft_teacher(soft_background=soft)
        weights[soft] = method.losses(toy_batch(method, 0, 2, 3), 0)["background_weight"].item()
    assert weights[False] == 1.0
    assert 0 < weights[True] < 0.99


@pytest.mark.parametrize("found", [0, 5])
@pytest.mark.parametrize("rule", ["learn", "skip"])
def test_batches_without_boxes_teach_background_or_nothing(found, rule):
    losses = {}
    for empty_batches in ("learn", rule):
        method = soft_teacher(empty_batches=empty_batches)
        torch.manual_seed(0)  # of the jitter
        losses[empty_batches] = method.losses(toy_batch(method, 1, 2, found), 0)
    skipped = rule == "skip" and not found
    for name in (*RPN, *ROI):
        value = losses["learn"][f"{name}_pseudo"].item()
        expected = 0.0 if skipped else value
        assert losses[rule][f"{name}_pseudo"].item() == pytest.approx(expected)
    assert losses["learn"]["loss_cls_pseudo"].item() > 0
    assert losses[rule]["loss_cls_pseudo"].requires_grad


def test_burn_in_trains_on_labeled_images_alone_while_the_teacher_follows():
    method = soft_teacher(burn_in_iters=2)
    batch = toy_batch(method, 0, 2, 3)
    assert [len(method.losses(batch, t)) for t in range(4)] == [1, 1, 10, 10]
    before = method.teacher.model.scores.clone()
    method.after_step(0)
    assert not torch.equal(before, method.teacher.model.scores)


def test_all_that_the_teacher_finds_is_counted_and_what_passes_is_used():
    method = soft_teacher(bbox_threshold=0.65)
    batch = toy_batch(method, 0, 2, 0)
    boxes = torch.tensor([[20.0, 20.0, 50.0, 40.0]]).repeat(3, 1)
    scores = torch.tensor([0.99, 0.7, 0.3])
    method.teacher.model.found[1] = Detections(boxes, torch.tensor([0, 1, 1]), scores)
    method.label_statistics = LabelStatistics(CLASSES)
    method.losses(batch, 0)
    counts = method.label_statistics.take()
    assert counts.used.tolist() == [1, 1, 0]
    assert (counts.images, counts.empty) == (2, 1)


# ------------------------------------------------------------------------------------- teacher


def random_walk(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("warmup", [True, False])
def test_each_pass_sees_the_teacher_of_the_public_code(warmup):
    """It updates at the start of iteration t, with min(a, 1 - 1 / (t + 1)) and student t - 1."""
    torch.manual_seed(0)
    method = SoftTeacher(Toy(), SoftTeacherOptions(ema_decay=0.7, ema_warmup=warmup))
    public = copy.deepcopy(method.student.scores.detach())
    decays = []
    for t in range(8):
        decay = min(0.7, 1 - 1 / (t + 1)) if warmup else 0.7
        decays.append(decay)
        public = decay * public + (1 - decay) * method.student.scores.detach()
        torch.testing.assert_close(method.teacher.model.scores.detach(), public)
        random_walk(method.student)
        method.after_step(t)
    if warmup:
        assert decays[:4] == pytest.approx([0, 1 / 2, 2 / 3, 0.7])


def detector(norm, **groups):
    torch.manual_seed(0)
    options = detector_options(
        backbone={"freeze_at": 0},
        resnets={"depth": 18, "norm": norm},
        fpn={"out_channels": 8},
        rpn={
            "pre_nms_topk_train": 20,
            "post_nms_topk_train": 10,
            "pre_nms_topk_test": 5,
            "post_nms_topk_test": 4,
        },
        roi_heads={"batch_size_per_image": 8, "score_thresh_test": 0.0},
        roi_box_head={"fc_dim": 16},
    )
    return TorchvisionFasterRCNN(detector_options(options, **groups), num_classes=3)


def test_parameters_alone_are_averaged():
    method = SoftTeacher(detector("FrozenBN"), SoftTeacherOptions())
    random_walk(method.student)
    with torch.no_grad():
        for buffer in method.student.buffers():
            buffer.add_(1)
    before = {name: x.clone() for name, x in method.teacher.model.named_buffers()}
    method.after_step(0)
    for name, buffer in method.teacher.model.named_buffers():
        assert torch.equal(buffer, before[name])
    mean = method.teacher.model.roi_heads.box_predictor.cls_score.weight
    assert not torch.equal(mean, method.student.roi_heads.box_predictor.cls_score.weight)


def test_a_teacher_that_would_not_follow_trained_norms_is_refused():
    with pytest.raises(ConfigError, match=r"EMA_BUFFERS = 'skip' is not allowed .*body\.bn1"):
        SoftTeacher(detector("BN"), SoftTeacherOptions())
    method = SoftTeacher(detector("BN"), SoftTeacherOptions(ema_buffers="ema"))
    student, teacher = (m.backbone.body.bn1 for m in (method.student, method.teacher.model))
    student.running_mean.fill_(2.0)
    method.after_step(5)
    assert 0 < teacher.running_mean[0] < 2


def test_a_detector_without_regions_is_refused():
    class Dense(Toy):
        abilities = frozenset({"dense"})

    with pytest.raises(ConfigError, match=r"SoftTeacher needs a detector with .* 'regions'"):
        SoftTeacher(Dense(), SoftTeacherOptions())


# ------------------------------------------------------------------------- with a real detector


def real_batch(sizes=((64, 64), (64, 64), (30, 64))):
    """Images of two padded sizes, the strong views half as large."""
    generator = torch.Generator().manual_seed(0)
    weak, strong, colored = [], [], []
    for height, width in sizes:
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        eye = torch.eye(3, dtype=torch.float64)
        weak.append(View(image, eye, None))
        half = torch.diag(torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))
        strong.append(View(image[:, ::2, ::2].contiguous(), half, None))
        targets = Targets(torch.tensor([[4.0, 4.0, 40.0, 30.0]]), torch.tensor([1]))
        colored.append(View(image, eye, targets))
    indices = torch.arange(len(sizes))
    return Batch(
        labeled=Part({"colored": colored}, None, indices),
        unlabeled=Part({"weak": weak, "strong": strong}, None, indices),
    )


EAGER = {"initial_threshold": 0.0, "rpn_threshold": 0.25, "bbox_threshold": 0.25}


def test_each_unlabeled_image_passes_the_teachers_backbone_once():
    method = SoftTeacher(detector("FrozenBN"), SoftTeacherOptions(**EAGER))
    passed = []
    method.teacher.model.backbone.register_forward_hook(
        lambda module, inputs, output: passed.append(len(inputs[0]))
    )
    method.losses(real_batch(), 0)
    assert sorted(passed) == [1, 2]


@pytest.mark.parametrize("options", [EAGER, {"initial_threshold": 1.0}], ids=["boxes", "none"])
@pytest.mark.parametrize("sizes", [((64, 64),), ((64, 64), (64, 64), (30, 64))])
def test_every_parameter_gets_a_gradient(options, sizes):
    method = SoftTeacher(detector("FrozenBN"), SoftTeacherOptions(**options))
    losses = method.losses(real_batch(sizes), 0)
    assert (losses["pseudo_boxes"].item() > 0) == (options is EAGER)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    gradients = [p.grad for p in method.student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(p.grad is None for p in method.teacher.model.parameters())


def test_with_equal_labels_and_weights_of_1_the_losses_are_the_detectors_own():
    everything = {"batch_size_per_image": 4096, "positive_fraction": 1.0}
    student = detector("FrozenBN", rpn=everything, roi_heads=everything)
    batch = real_batch()
    views = batch["labeled"].views["colored"]
    images, targets = [view.image for view in views], [view.targets for view in views]

    def ones(boxes):
        return torch.cat([torch.ones(len(item)) for item in boxes])

    expected = student(images, SupervisedLoss(targets))
    losses = student(images, SoftTeacherLoss(targets, targets, targets, ones))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


@pytest.mark.parametrize(("choice", "limit"), [("train", 10), ("test", 4)])
def test_the_teacher_looks_at_as_many_proposals_as_training_or_as_evaluation(choice, limit):
    method = SoftTeacher(
        detector("FrozenBN"), SoftTeacherOptions(teacher_proposals=choice, **EAGER)
    )
    counts = []
    heads = method.teacher.model.roi_heads
    heads.box_roi_pool.register_forward_pre_hook(
        lambda module, inputs: counts.append([len(boxes) for boxes in inputs[1]])
    )
    method.losses(real_batch(), 0)
    detected = [count for group in counts[:2] for count in group]
    assert detected == [limit] * 3
    counts.clear()
    method.teacher.model.detect([view.image for view in real_batch()["unlabeled"].views["weak"]])
    assert [count for group in counts for count in group] == [4] * 3


def gradients_of_rank(rank, *, parallel):
    """Gradients of one rank's batch, alone or exchanged with the other rank."""
    method = SoftTeacher(detector("FrozenBN"), SoftTeacherOptions(**EAGER))
    if parallel:
        method.parallel_student = DistributedDataParallel(method.student, broadcast_buffers=False)
    torch.manual_seed(rank)
    # Ranks may have other numbers of images: a drawn batch.
    losses = method.losses(real_batch(((64, 64),) * (1 + rank)), 0)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    return {name: p.grad.clone() for name, p in method.student.named_parameters()}


@pytest.mark.slow
def test_the_ranks_gradients_are_averaged(tmp_path):
    check_mean_of_gradients(gradients_of_rank, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"jitters": 1}, {"ema_buffers": "all"}, {"box_deviation": -1}, {"bbox_threshold": 2}],
)
def test_wrong_options_are_refused(changes):
    with pytest.raises(ValueError, match="is not allowed"):
        SoftTeacherOptions(**changes)


def test_what_it_reads():
    assert soft_teacher().reads == {"labeled": ("colored",), "unlabeled": ("weak", "strong")}
