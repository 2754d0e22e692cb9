import math

import pytest
import torch
from dense_toys import cross_entropy, overlap_by_hand, sigmoid
from detection_toys import (
    BOX,
    check_mean_of_gradients,
    pictures,
    small_fcos,
    small_retinanet,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.build import build_method
from ssod_imwa.detection.data.geometry import flip_matrix, scale_matrix
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.detectors.parts import DenseMaps, Parts
from ssod_imwa.detection.methods.dense_teacher import (
    DenseLoss,
    DenseTeacher,
    DenseTeacherOptions,
    label_densely,
    ramp,
    region_detections,
)
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.errors import ConfigError

CLASSES = 3


class GivenParts(Parts):
    """Parts whose maps are given."""

    def __init__(self, maps):
        super().__init__("a toy", [torch.zeros(3, 8, 8)] * len(maps.logits))
        self._maps = maps

    def dense_maps(self):
        return self._maps

    def losses(self, targets):
        raise NotImplementedError

    def detections(self):
        raise NotImplementedError


def random_maps(images, places, seed, *, quality=True):
    generator = torch.Generator().manual_seed(seed)
    kinds = {"generator": generator, "dtype": torch.float64}
    start = 50 * torch.rand(images, places, 2, **kinds)
    boxes = torch.cat([start, start + 1 + 20 * torch.rand(images, places, 2, **kinds)], dim=2)
    logits = 3 * torch.randn(images, places, CLASSES, **kinds)
    qualities = torch.randn(images, places, **kinds) if quality else None
    return DenseMaps(logits, boxes, qualities, (places,))


def losses_by_hand(student, teacher, ratio):
    """The paper's equations, one location and class at a time."""
    images, places, classes = teacher.logits.shape
    where = [(image, place) for image in range(images) for place in range(places)]
    p_t, p_s = (
        {i: [sigmoid(x) for x in maps.logits[i].tolist()] for i in where}
        for maps in (teacher, student)
    )
    ranked = sorted(where, key=lambda i: max(p_t[i]), reverse=True)
    region = set(ranked[: max(1, math.floor(ratio * len(where)))])
    total = sum(max(p_t[i]) for i in region)
    focal = box = fit = 0.0
    for i in where:
        for c in range(classes):
            goal = p_t[i][c] if i in region else 0.0
            focal += (goal - p_s[i][c]) ** 2 * cross_entropy(student.logits[i][c].item(), goal)
        if i in region:
            box += 1 - overlap_by_hand(student.boxes[i].tolist(), teacher.boxes[i].tolist())[1]
            if student.quality is not None:
                goal = sigmoid(teacher.quality[i].item())
                fit += cross_entropy(student.quality[i].item(), goal)
    found = {"loss_cls": focal / total, "loss_box_reg": box / len(region)}
    return {**found, "loss_quality": fit / len(region)} if student.quality is not None else found


@pytest.mark.parametrize("quality", [True, False])
@pytest.mark.parametrize(
    ("images", "places", "ratio"),
    [(2, 60, 0.05), (1, 60, 0.1), (3, 20, 1.0), (1, 9, 0.01)],
    ids=["two images", "one image", "everything", "less than one location"],
)
def test_losses_equal_the_equations_location_by_location(images, places, ratio, quality):
    teacher = random_maps(images, places, 1, quality=quality)
    student = random_maps(images, places, 2, quality=quality)
    losses = DenseLoss(label_densely(teacher, ratio))(GivenParts(student))
    expected = losses_by_hand(student, teacher, ratio)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name


def test_a_student_that_is_the_teacher_has_only_the_suppressed_part_to_learn():
    maps = random_maps(2, 50, 3)
    labels = label_densely(maps, 0.1)
    losses = DenseLoss(labels)(GivenParts(maps))
    assert losses["loss_box_reg"].item() == pytest.approx(0, abs=1e-6)
    outside = torch.ones(100, dtype=torch.bool)
    outside[labels.region] = False
    p = maps.logits.flatten(0, 1)[outside].sigmoid()
    suppressed = (p**2 * -(1 - p).log()).sum() / labels.total
    assert losses["loss_cls"].item() == pytest.approx(suppressed.item(), rel=1e-6)


def test_the_region_is_of_the_whole_batch_and_rounded_down():
    maps = random_maps(2, 100, 4)
    maps.logits[1] -= 100  # all of the best are in the first image
    assert len(label_densely(maps, 0.0199).region) == 3
    assert label_densely(maps, 0.0199).region.max() < 100
    assert len(label_densely(maps, 0.02).region) == 4
    scores = maps.logits.sigmoid().amax(2).flatten()
    assert label_densely(maps, 0.02).total.item() == pytest.approx(scores.topk(4).values.sum())


def test_a_teacher_that_is_sure_of_nothing_gives_finite_losses():
    teacher, student = random_maps(1, 10, 5), random_maps(1, 10, 6)
    teacher.logits.fill_(-800.0)
    student.logits.requires_grad_()
    losses = DenseLoss(label_densely(teacher, 0.1))(GivenParts(student))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert student.logits.grad.isfinite().all()


def test_what_the_region_says_is_one_box_for_each_object():
    logits = torch.full((2, 5, CLASSES), -9.0)
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 9, 10], [40, 0, 50, 9], [5] * 4])
    logits[0, :4, 1] = torch.tensor([1.0, 3.0, 2.0, 0.5])  # three of one object, one of another
    logits[0, 2, 1], logits[0, 2, 2] = -9.0, 2.5  # and one that is of another class
    logits[1, 0, 0] = -1.0
    maps = DenseMaps(logits, boxes.expand(2, -1, -1), None, (5,))
    first, second = region_detections(label_densely(maps, 0.5))
    assert first.labels.tolist() == [1, 2, 1]
    assert first.boxes.tolist() == boxes[[1, 2, 3]].tolist()
    expected = torch.tensor([3.0, 2.5, 0.5]).sigmoid().tolist()
    assert first.scores.tolist() == pytest.approx(expected)
    assert second.labels.tolist() == [0]
    assert second.scores.tolist() == pytest.approx([sigmoid(-1)])


def test_what_is_taught_is_counted_where_somebody_looks():
    method = DenseTeacher(small_fcos(), DenseTeacherOptions(burn_in_iters=0, ema_start_iters=0))
    with torch.no_grad():
        method.teacher.model.head.classification_head.cls_logits.bias.fill_(2.0)
    method.label_statistics = LabelStatistics(CLASSES)
    method.losses(pictures(0, 2), 1)
    views, labels = method.last_labels
    assert len(views) == len(labels) == 2
    counts = method.label_statistics.take()
    assert counts.images == 2
    assert counts.used.sum() == sum(map(len, labels)) > 0


@pytest.mark.parametrize(
    ("burn_in", "expected"),
    [
        (10, {0: 0, 10: 0, 11: 0.1, 15: 0.5, 20: 1, 21: 1}),
        (1, {0: 0, 1: 0, 2: 1, 3: 1}),
        (0, {0: 0, 1: 1, 2: 1}),
    ],
)
def test_ramp_rises_from_the_end_of_burn_in_to_twice_its_length(burn_in, expected):
    assert {t: ramp(t, burn_in) for t in expected} == pytest.approx(expected)


class LinearDetector(Detector):
    """Its maps are the image's first row times a weight; losses of boxes are quadratic in it."""

    abilities = frozenset({"dense"})

    def __init__(self):
        super().__init__(num_classes=1)
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen = []

    def parts(self, images):
        self.seen.append([int(image[0, 0, 0]) for image in images])
        rows = torch.stack([image[0, 0].double() for image in images])
        start = torch.stack([rows, rows], dim=2)
        boxes = torch.cat([start, start + 3], dim=2)
        maps = DenseMaps((self.weight * rows / 50)[..., None], boxes, rows / 50, (4,))
        parts = GivenParts(maps)
        parts.losses = lambda targets: {"loss_cls": (self.weight - len(targets)) ** 2}
        return parts


def view(number, *, labeled):
    image = (torch.arange(4, dtype=torch.uint8) + number).expand(3, 2, 4)
    targets = Targets(torch.rand(2, 4), torch.tensor([0, 0])) if labeled else None
    return View(image, torch.eye(3, dtype=torch.float64), targets)


def part(*numbers, labeled):
    views = {
        "weak": [view(number, labeled=labeled) for number in numbers],
        "strong": [view(100 + number, labeled=labeled) for number in numbers],
    }
    return Part(views, None, torch.arange(len(numbers)))


def batch():
    return Batch(labeled=part(1, 2, labeled=True), unlabeled=part(50, 60, labeled=False))


def dense_teacher(**changes):
    settings = {
        "burn_in_iters": 4,
        "ema_start_iters": 2,
        "ema_decay": 0.75,
        "region_ratio": 0.5,
        **changes,
    }
    return DenseTeacher(LinearDetector(), DenseTeacherOptions(**settings))


def test_burn_in_trains_on_labeled_views_alone():
    method = dense_teacher()
    for t in range(5):
        assert list(method.losses(batch(), t)) == ["loss_cls"]
    assert method.student.seen == [[101, 102, 1, 2]] * 5
    assert method.teacher.model.seen == []


def test_after_burn_in_the_student_learns_the_teachers_maps_on_strong_views():
    method = dense_teacher()
    losses = method.losses(batch(), 8)
    assert method.student.seen == [[101, 102, 1, 2], [150, 160]]
    assert method.teacher.model.seen == [[50, 60]]
    names = ("loss_cls", "loss_box_reg", "loss_quality")
    assert losses.keys() == {"loss_cls", *(f"{name}_pseudo" for name in names), "pseudo_score"}
    scores = [sigmoid((60 + n) / 50) for n in range(4)]
    assert losses["pseudo_score"].item() == pytest.approx(sum(scores) / 4, rel=1e-6)


def test_losses_on_dense_labels_are_weighted_and_rise():
    ones = {f"unsup_{name}loss_weight": 1.0 for name in ("", "box_", "quality_")}
    plain = dense_teacher(**ones).losses(batch(), 8)
    weights = {"unsup_loss_weight": 3.0, "unsup_box_loss_weight": 0.5}
    weighted = dense_teacher(**weights, unsup_quality_loss_weight=2.0)
    factors = {"loss_cls": 3.0, "loss_box_reg": 0.5, "loss_quality": 2.0}
    for t, share in ((5, 0.25), (6, 0.5), (8, 1.0), (100, 1.0)):
        losses = weighted.losses(batch(), t)
        assert losses["loss_cls"].item() == plain["loss_cls"].item()
        for name, factor in factors.items():
            expected = share * factor * plain[f"{name}_pseudo"].item()
            assert losses[f"{name}_pseudo"].item() == pytest.approx(expected) != 0


def train(method, steps, make_batch=batch):
    optimizer = torch.optim.SGD(method.student.parameters(), lr=1e-3)
    for t in range(steps):
        method.student.train()
        losses = method.losses(make_batch(), t)
        optimizer.zero_grad()
        sum(x for name, x in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
        method.after_step(t)
        yield t


def test_the_teacher_is_copied_at_its_own_start_and_then_follows_the_formula():
    method = dense_teacher()
    initial, expected = method.teacher.model.weight.item(), None
    for t in train(method, 8):
        student, teacher = (model.weight.item() for model in method.models().values())
        if t < 1:
            assert teacher == initial
        elif t == 1:
            assert teacher == student != initial
            expected = student
        else:
            expected = 0.75 * expected + 0.25 * student
            assert teacher == pytest.approx(expected, rel=1e-12)
    assert [method.teacher.ready(t) for t in range(4)] == [False, True, True, True]
    assert not method.teacher.model.training


def test_it_reads_strong_views_of_labeled_images_only_if_it_trains_on_them():
    both = ("weak", "strong")
    assert dense_teacher().reads == {"labeled": both, "unlabeled": both}
    alone = dense_teacher(strong_labeled=False)
    assert alone.reads == {"labeled": ("weak",), "unlabeled": both}
    del (weak_alone := batch())["labeled"].views["strong"]
    assert "loss_cls_pseudo" in alone.losses(weak_alone, 8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"burn_in_iters": -1}, "burn_in_iters = -1"),
        ({"ema_start_iters": 5}, "ema_start_iters = 5 .*at most burn_in_iters = 4"),
        ({"ema_decay": 1.5}, "ema_decay = 1.5"),
        ({"region_ratio": 0.0}, "region_ratio = 0.0"),
        ({"region_ratio": 1.1}, "region_ratio = 1.1"),
        ({"unsup_loss_weight": -1.0}, "unsup_loss_weight"),
        ({"unsup_box_loss_weight": -1.0}, "unsup_box_loss_weight"),
        ({"unsup_quality_loss_weight": -1.0}, "unsup_quality_loss_weight"),
    ],
)
def test_wrong_arguments_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dense_teacher(**changes)


class NoMaps(LinearDetector):
    abilities = frozenset()


def test_a_detector_without_maps_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"DenseTeacher needs .* 'dense' .* which NoMaps"):
        DenseTeacher(NoMaps(), DenseTeacherOptions())


@pytest.mark.parametrize("t", [0, 8])
@pytest.mark.parametrize("change", ["mirrored", "turned", "rescaled", "cropped"])
def test_strong_views_with_another_geometry_are_refused(change, t):
    """Before burn-in is over, too: maps cannot be turned, so boxes would be wrong."""
    images = batch()
    weak = images["unlabeled"].views["weak"]
    strong = images["unlabeled"].views["strong"]
    image, turn = strong[1].image, torch.eye(3, dtype=torch.float64)
    if change == "mirrored":
        image, turn = image.flip(-1), flip_matrix(4)
    elif change == "turned":
        image = image.rot90(1, (-2, -1))
        turn[:2] = torch.tensor([[0.0, 1, 0], [-1, 0, 4]])
    elif change == "rescaled":
        image, turn = image.repeat_interleave(2, -1).repeat_interleave(2, -2), scale_matrix(2, 2)
    else:
        image = image[..., :3]
    strong[1] = View(image, turn @ weak[1].matrix, None)
    with pytest.raises(ConfigError, match="'dense_teacher' needs strong views with the geometry"):
        dense_teacher().losses(images, t)


NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("build", [small_fcos, small_retinanet])
@pytest.mark.parametrize("targets", [BOX, NOTHING], ids=["boxes", "no boxes"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_parameter_has_a_finite_gradient(build, targets, count):
    options = DenseTeacherOptions(burn_in_iters=0, ema_start_iters=0)
    method = DenseTeacher(build(), options)
    losses = method.losses(pictures(0, count, targets), 1)
    assert ("loss_quality_pseudo" in losses) == (build is small_fcos)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    gradients = [p.grad for p in method.student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_padded_locations_count_and_views_of_several_sizes_share_a_batch():
    method = DenseTeacher(small_fcos(), DenseTeacherOptions(burn_in_iters=0, ema_start_iters=0))
    images = pictures(0, 2)
    for views in images["unlabeled"].views.values():
        views[1] = View(views[1].image[:, :40, :33], views[1].matrix, None)
    assert method.losses(images, 1)["loss_cls_pseudo"].isfinite()
    maps = method.teacher.model.dense_maps([v.image for v in images["unlabeled"].views["weak"]])
    assert maps.logits.shape[:2] == (2, 64 + 16 + 4 + 1 + 1)
    assert len(label_densely(maps, 0.1).region) == 17


def test_a_students_maps_come_to_the_teachers():
    torch.manual_seed(1)
    student, teacher = small_fcos(), small_fcos()
    with torch.no_grad():
        for name, x in teacher.head.named_parameters():
            if name.endswith(("cls_logits.weight", "bbox_reg.weight")):
                x.normal_(std=0.1)
    images = [view.image for view in pictures(0, 2)["unlabeled"].views["weak"]]
    objective = DenseLoss(label_densely(teacher.dense_maps(images), 0.05))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    history = []
    for _ in range(25):
        losses = student.train()(images, objective)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    for name in ("loss_cls", "loss_box_reg"):
        assert history[-1][name] < 0.85 * history[0][name]


def gradients_of(rank, *, parallel):
    options = DenseTeacherOptions(burn_in_iters=0, ema_start_iters=0)
    method = DenseTeacher(small_fcos(), options)
    if parallel:
        group = Group(rank, 2)
        method.join(Ranks(group, group))
        assert method.student.group is group
        method.parallel_student = DistributedDataParallel(method.student, broadcast_buffers=False)
    losses = method.losses(pictures(100 * rank, 1), 1)
    sum(x for name, x in losses.items() if name.startswith("loss")).backward()
    return {name: p.grad.clone() for name, p in method.student.named_parameters()}


@pytest.mark.slow
def test_two_forward_passes_under_ddp_average_the_ranks_gradients(tmp_path):
    """The regions are each rank's own; both images have one box, so the divisors are equal."""
    check_mean_of_gradients(gradients_of, tmp_path, rtol=1e-3, atol=1e-5)


def test_a_run_with_geometric_strong_views_is_refused_before_it_begins(detection_config):
    settings = ("SSOD.ALGORITHM", "dense_teacher", "INPUT.STRONG.KIND", "geometric")
    with pytest.raises(ConfigError) as caught:
        build_method(detection_config(*settings), LinearDetector())
    assert str(caught.value) == (
        "INPUT.STRONG.KIND = 'geometric' is not allowed with SSOD.ALGORITHM = 'dense_teacher' "
        "(must be 'photometric': it learns maps location by location)"
    )


def test_a_run_whose_teacher_starts_too_late_is_refused_before_it_begins(detection_config):
    cfg = detection_config("SSOD.ALGORITHM", "dense_teacher", "SSOD.EMA_START_ITERS", 2)
    with pytest.raises(ConfigError, match="SSOD: ema_start_iters = 2 is not allowed"):
        build_method(cfg, LinearDetector())


def test_a_run_with_a_two_stage_detector_is_refused_before_it_begins(detection_config):
    settings = ("SSOD.ALGORITHM", "dense_teacher", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    cfg = detection_config(*settings)
    with pytest.raises(ConfigError, match=r"which torchvision's Faster R-CNN does not"):
        build_method(cfg, build_detector(cfg, 2))


@pytest.mark.parametrize("name", ["FCOS", "RetinaNet"])
def test_the_detector_of_a_configuration(detection_config, name):
    changes = {"FCOS": "MODEL.FCOS.PRIOR_PROB", "RetinaNet": "MODEL.RETINANET.PRIOR_PROB"}
    settings = ("SSOD.ALGORITHM", "supervised", "MODEL.META_ARCHITECTURE", name)
    cfg = detection_config(*settings, changes[name], 0.2, "TEST.DETECTIONS_PER_IMAGE", 7)
    detector = build_detector(cfg, CLASSES)
    assert detector.name == f"torchvision's {name}"
    bias = detector.head.classification_head.cls_logits.bias
    assert bias.sigmoid().tolist() == pytest.approx([0.2] * len(bias))
    assert detector.options.detections.detections_per_image == 7
