"""FCOS and RetinaNet of torchvision's parts, against plain loops and torchvision's own."""

import dataclasses
import math

import pytest
import torch
from support import on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.fcos import FCOSHead as PlainFCOSHead
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import box_iou

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.dense import best_detections, one_hot_targets
from ssod_imwa.detection.detectors.fcos import build_fcos
from ssod_imwa.detection.detectors.options import (
    AnchorOptions,
    BackboneOptions,
    DetectionOptions,
    FCOSHeadOptions,
    FCOSOptions,
    FPNOptions,
    ImageOptions,
    ResNetOptions,
    RetinaNetHeadOptions,
    RetinaNetOptions,
)
from ssod_imwa.detection.detectors.parts import DenseMaps
from ssod_imwa.detection.detectors.retinanet import build_retinanet
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.errors import UserError, WeightsError

CLASSES = 3
COMMON = {
    "backbone": BackboneOptions(freeze_at=0),
    "resnets": ResNetOptions(depth=18, norm="FrozenBN"),
    "fpn": FPNOptions(out_channels=64),
}
ANCHORS = AnchorOptions(
    sizes=[[12.0, 16.0], [24.0, 32.0], [48.0, 64.0], [96.0, 128.0], [192.0, 256.0]],
    aspect_ratios=[[1.0, 2.0]],
)
SIZES = [12.0, 24.0, 48.0, 96.0]
TARGETS = [
    Targets(
        torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0], [30.0, 30.0, 44.0, 46.0]]),
        torch.tensor([2, 0, 0]),
    ),
    Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]
BACKGROUND = TARGETS[1:] * 2


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


IMAGES = images((64, 96), (50, 70))


def fcos(common=COMMON, initial=False, **changes):
    torch.manual_seed(0)
    head = FCOSHeadOptions(num_convs=1, sizes_of_interest=SIZES, prior_prob=0.1)
    options = FCOSOptions(**common, fcos=dataclasses.replace(head, **changes))
    detector = build_fcos(options, num_classes=CLASSES)
    return detector if initial else lively(detector)


def retinanet(common=COMMON, anchors=ANCHORS, initial=False, **changes):
    torch.manual_seed(0)
    head = dataclasses.replace(RetinaNetHeadOptions(prior_prob=0.1), **changes)
    options = RetinaNetOptions(**common, anchor_generator=anchors, retinanet=head)
    detector = build_retinanet(options, num_classes=CLASSES)
    return detector if initial else lively(detector)


def lively(detector):
    """Initial heads say nearly the same everywhere."""
    with torch.no_grad():
        for name, x in detector.head.named_parameters():
            if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight")):
                x.normal_(std=0.1)
            if name.endswith("scales"):
                x.copy_(torch.tensor([0.8, 1.1, 1.3, 0.9, 1.2]))
    return detector


BUILDERS = [fcos, retinanet]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def focal_by_hand(logits, labels, alpha=0.25, gamma=2.0):
    """The sum over locations, whose labels may be -1, and classes."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for number, logit in enumerate(row):
            p = sigmoid(logit)
            if label == number:
                total -= alpha * (1 - p) ** gamma * math.log(p)
            elif label >= 0:
                total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


def overlap_by_hand(one, other):
    """IoU and GIoU of two boxes."""
    x1, y1, x2, y2 = one
    a1, b1, a2, b2 = other
    width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
    intersection = max(width, 0) * max(height, 0)
    union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - intersection
    hull = (max(x2, a2) - min(x1, a1)) * (max(y2, b2) - min(y1, b1))
    return intersection / union, intersection / union - (hull - union) / hull


def centerness_by_hand(point, box):
    x, y = point
    x1, y1, x2, y2 = box
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
    return math.sqrt(ratio)


def cross_entropy(logit, target):
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


@pytest.mark.parametrize("quality", ["iou", "centerness"])
@pytest.mark.parametrize("batch", [(IMAGES, TARGETS), (IMAGES[:1], TARGETS[:1])], ids=["2", "1"])
def test_losses_of_fcos_equal_the_formulas_location_by_location(batch, quality):
    detector = fcos(quality=quality)
    pictures, targets = batch
    losses = detector(pictures, SupervisedLoss(targets))
    parts = detector.parts(pictures)
    maps, points = parts.dense_maps(), parts._locations.points.tolist()
    focal = box = fit = 0.0
    positives = 0
    for number, target in enumerate(targets):
        assigned = assigned_by_hand(parts._locations, target)
        labels = [CLASSES if n is None else int(target.labels[n]) for n in assigned]
        focal += focal_by_hand(maps.logits[number], torch.tensor(labels))
        for place, matched in enumerate(assigned):
            if matched is None:
                continue
            positives += 1
            predicted = maps.boxes[number, place].double().tolist()
            wanted = target.boxes[matched].double().tolist()
            iou, giou = overlap_by_hand(predicted, wanted)
            box += 1 - giou
            if quality == "centerness":
                iou = centerness_by_hand(points[place], wanted)
            fit += cross_entropy(maps.quality[number, place].item(), iou)
    assert positives > 2
    assert losses["loss_cls"].item() == pytest.approx(focal / positives, rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(box / positives, rel=1e-4)
    name = "loss_quality" if quality == "iou" else "loss_centerness"
    assert losses[name].item() == pytest.approx(fit / positives, rel=1e-4)
    assert len(losses) == 3


def assigned_by_hand(locations, target):
    edges = [-1, *SIZES, math.inf]
    levels = [n for n, count in enumerate(locations.levels) for _ in range(count)]
    chosen = []
    for (x, y), stride, level in zip(
        locations.points.tolist(), locations.strides.tolist(), levels, strict=True
    ):
        best, smallest = None, math.inf
        for number, (x1, y1, x2, y2) in enumerate(target.boxes.tolist()):
            distances = (x - x1, y - y1, x2 - x, y2 - y)
            center = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
            area = (x2 - x1) * (y2 - y1)
            inside = min(distances) > 0 and center < 1.5 * stride
            if inside and edges[level] <= max(distances) <= edges[level + 1] and area < smallest:
                best, smallest = number, area
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_losses_of_retinanet_equal_the_formulas_anchor_by_anchor(beta):
    detector = retinanet(smooth_l1_loss_beta=beta)
    losses = detector(IMAGES, SupervisedLoss(TARGETS))
    parts = detector.parts(IMAGES)
    logits, deltas = parts._outputs
    anchors = parts._anchors.double()
    focal = distance = 0.0
    positives = 0
    for number, target in enumerate(TARGETS):
        labels, boxes = matched_by_hand(anchors, target)
        focal += focal_by_hand(logits[number], torch.tensor(labels))
        for place, label in enumerate(labels):
            if not 0 <= label < CLASSES:
                continue
            positives += 1
            x1, y1, x2, y2 = anchors[place].tolist()
            a1, b1, a2, b2 = boxes[place]
            wanted = (
                ((a1 + a2) / 2 - (x1 + x2) / 2) / (x2 - x1),
                ((b1 + b2) / 2 - (y1 + y2) / 2) / (y2 - y1),
                math.log((a2 - a1) / (x2 - x1)),
                math.log((b2 - b1) / (y2 - y1)),
            )
            for value, goal in zip(deltas[number, place].double().tolist(), wanted, strict=True):
                difference = abs(value - goal)
                smooth = difference < beta
                distance += difference**2 / (2 * beta) if smooth else difference - beta / 2
    assert positives > 3
    assert losses["loss_cls"].item() == pytest.approx(focal / positives, rel=1e-4)
    assert losses["loss_box_reg"].item() == pytest.approx(distance / positives, rel=1e-4)
    assert len(losses) == 2


def matched_by_hand(anchors, target):
    """Labels, -1 for what is learned by nobody, and boxes of anchors."""
    if not len(target):
        return [CLASSES] * len(anchors), [None] * len(anchors)
    ious = [
        [overlap_by_hand(anchor, box)[0] for box in target.boxes.tolist()]
        for anchor in anchors.tolist()
    ]
    best_of_box = [max(column) for column in zip(*ious, strict=True)]
    labels, boxes = [], []
    for row in ious:
        box = row.index(max(row))
        label = -1 if 0.4 <= row[box] < 0.5 else CLASSES
        # An anchor that fits a box as well as any learns the box that fits itself best.
        is_best = any(abs(iou - best) < 1e-9 for iou, best in zip(row, best_of_box, strict=True))
        if row[box] >= 0.5 or is_best:
            label = int(target.labels[box])
        labels.append(label)
        boxes.append(target.boxes[box].tolist())
    return labels, boxes


def test_losses_of_retinanet_are_torchvisions_for_one_image():
    detector = retinanet(smooth_l1_loss_beta=0.0)
    plain = RetinaNet(detector.backbone, CLASSES, detector.anchor_generator)
    detector.head.compute_loss = None
    parts = detector.parts(IMAGES[:1])
    logits, deltas = parts._outputs
    their_targets = [{"boxes": TARGETS[0].boxes, "labels": TARGETS[0].labels}]
    expected = plain.compute_loss(
        their_targets, {"cls_logits": logits, "bbox_regression": deltas}, [parts._anchors]
    )
    losses = parts.losses(TARGETS[:1])
    torch.testing.assert_close(losses["loss_cls"], expected["classification"])
    torch.testing.assert_close(losses["loss_box_reg"], expected["bbox_regression"])


def test_losses_of_fcos_are_torchvisions_with_scales_of_1_and_centerness():
    detector = fcos(quality="centerness")
    nn.init.ones_(detector.head.regression_head.scales)
    parts = detector.parts(IMAGES)
    maps, locations = parts.dense_maps(), parts._locations
    half = locations.strides[:, None] / 2
    anchors = torch.cat([locations.points - half, locations.points + half], dim=1)
    features = parts._features
    plain = PlainFCOSHead(64, 1, CLASSES, 1)
    state = detector.head.state_dict()
    del state["regression_head.scales"]
    plain.load_state_dict(state)
    outputs = plain(features)
    torch.testing.assert_close(outputs["cls_logits"], maps.logits)
    matches = [
        torch.tensor([-1 if n is None else n for n in assigned_by_hand(locations, target)])
        for target in TARGETS
    ]
    their_targets = [{"boxes": item.boxes, "labels": item.labels} for item in TARGETS]
    expected = plain.compute_loss(their_targets, outputs, [anchors] * 2, matches)
    losses = parts.losses(TARGETS)
    torch.testing.assert_close(losses["loss_cls"], expected["classification"])
    torch.testing.assert_close(losses["loss_box_reg"], expected["bbox_regression"])
    torch.testing.assert_close(losses["loss_centerness"], expected["bbox_ctrness"])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("targets", [TARGETS, BACKGROUND], ids=["boxes", "no boxes"])
def test_every_parameter_has_a_finite_gradient(build, targets):
    detector = build()
    losses = detector(IMAGES, SupervisedLoss(targets))
    sum(losses.values()).backward()
    assert losses["loss_cls"] > 0
    if targets is BACKGROUND:
        assert losses["loss_box_reg"] == 0
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("build", BUILDERS)
def test_maps_hold_all_locations_of_the_padded_batch(build):
    detector = build()
    maps = detector.dense_maps(IMAGES)
    per_place = 1 if build is fcos else 4
    assert maps.levels == tuple(per_place * n for n in (96, 24, 6, 2, 1))
    count = sum(maps.levels)
    assert maps.logits.shape == (2, count, CLASSES)
    assert maps.boxes.shape == (2, count, 4)
    assert (maps.quality is None) == (build is retinanet)
    assert not maps.logits.requires_grad
    assert detector.training
    again = detector.parts(IMAGES).dense_maps()
    torch.testing.assert_close(again.boxes, maps.boxes)
    assert again.boxes.requires_grad


def test_boxes_of_fcos_are_points_plus_scaled_distances():
    detector = fcos()
    parts = detector.parts(IMAGES)
    head = detector.head.regression_head
    raw = [head.bbox_reg(head.conv(level)) for level in parts._features]
    number = 0
    for level, (outputs, stride) in enumerate(zip(raw, (8, 16, 32, 64, 128), strict=True)):
        scale = head.scales[level].item()
        for row in range(outputs.shape[2]):
            for column in range(outputs.shape[3]):
                values = outputs[1, :, row, column].tolist()
                distances = [max(0, scale * x) * stride for x in values]
                x, y = column * stride, row * stride
                left, top, right, bottom = distances
                box = parts.dense_maps().boxes[1, number].tolist()
                assert box == pytest.approx([x - left, y - top, x + right, y + bottom], abs=1e-3)
                number += 1


def maps_of(levels, classes, *, quality, seed):
    generator = torch.Generator().manual_seed(seed)
    count = sum(levels)
    start = 60 * torch.rand(1, count, 2, generator=generator)
    boxes = torch.cat([start, start + 5 + 30 * torch.rand(1, count, 2, generator=generator)], 2)
    logits = 2 * torch.randn(1, count, classes, generator=generator) - 2
    qualities = torch.randn(1, count, generator=generator) if quality else None
    return DenseMaps(logits, boxes, qualities, levels)


def detections_by_hand(maps, size, *, score_thresh, topk, at_most_locations, nms_thresh, limit):
    height, width = size
    candidates, first = [], 0
    for count in maps.levels:
        pairs = []
        for place in range(first, first + count):
            for label, logit in enumerate(maps.logits[0, place].tolist()):
                pairs.append((sigmoid(logit), place, label))
        pairs.sort(reverse=True)
        for p, place, label in pairs[: min(topk, count) if at_most_locations else topk]:
            if p > score_thresh:
                score = p
                if maps.quality is not None:
                    score = math.sqrt(p * sigmoid(maps.quality[0, place].item()))
                x1, y1, x2, y2 = maps.boxes[0, place].tolist()
                box = [min(x1, width), min(y1, height), min(x2, width), min(y2, height)]
                candidates.append((score, label, box))
        first += count
    kept = []
    for candidate in sorted(candidates, reverse=True):
        _, label, box = candidate
        if all(
            other != label or overlap_by_hand(box, better)[0] <= nms_thresh
            for _, other, better in kept
        ):
            kept.append(candidate)
    return kept[:limit]


@pytest.mark.parametrize("quality", [True, False])
@pytest.mark.parametrize("at_most_locations", [True, False])
def test_detections_equal_the_rules_pair_by_pair(quality, at_most_locations):
    settings = {
        "score_thresh": 0.15,
        "topk": 25,
        "at_most_locations": at_most_locations,
        "nms_thresh": 0.4,
        "limit": 20,
    }
    for seed in range(3):
        maps = maps_of((40, 10, 2), CLASSES, quality=quality, seed=seed)
        (found,) = best_detections(maps, [(70, 80)], **settings)
        expected = detections_by_hand(maps, (70, 80), **settings)
        assert len(expected) > 10
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected])
        for box, (_, _, wanted) in zip(found.boxes.tolist(), expected, strict=True):
            assert box == pytest.approx(wanted, abs=1e-4)


def test_a_level_gives_no_more_candidates_than_it_has_locations():
    maps = maps_of((2,), CLASSES, quality=False, seed=0)
    maps.logits.fill_(3.0)
    settings = {"score_thresh": 0.1, "topk": 100, "nms_thresh": 1.0, "limit": 100}
    counts = [
        len(best_detections(maps, [(99, 99)], at_most_locations=flag, **settings)[0])
        for flag in (True, False)
    ]
    assert counts == [2, 2 * CLASSES]


@pytest.mark.parametrize("build", BUILDERS)
def test_detections_do_not_depend_on_the_other_images(build):
    detector = build(score_thresh_test=0.01)
    batch = images((64, 64), (50, 70), (64, 64), (33, 90))
    for image, found in zip(batch, detector.detect(batch), strict=True):
        assert len(found) > 0
        (alone,) = detector.detect([image])
        assert alone.labels.tolist() == found.labels.tolist()
        torch.testing.assert_close(alone.boxes, found.boxes, rtol=1e-3, atol=1e-2)
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert found.boxes[:, 0::2].max() <= width
        assert found.boxes[:, 1::2].max() <= height
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("build", BUILDERS)
def test_autocast_decodes_boxes_in_float32(build):
    detector = build(score_thresh_test=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(IMAGES, SupervisedLoss(TARGETS))
        maps = detector.dense_maps(IMAGES)
        (found, _) = detector.detect(IMAGES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert maps.logits.dtype == maps.boxes.dtype == found.boxes.dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_gradients_in_bfloat16_are_near_those_in_float32_on_maps_of_one_pixel(build):
    """torch's own, of a convolution with stride 2, hold what was in memory before."""
    found = []
    for enabled in (False, True):
        detector = build()
        rubbish = [torch.full((64, 64, 3, 3), 1e30, dtype=torch.bfloat16) for _ in range(20)]
        del rubbish
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = detector(IMAGES[1:], SupervisedLoss(TARGETS[:1]))
        sum(losses.values()).backward()
        found.append(detector.backbone.fpn.extra_blocks.p7.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1 * float(found[0].abs().max()))


@pytest.mark.parametrize("build", BUILDERS)
def test_no_ability_but_dense(build):
    assert build().abilities == {"dense"}
    assert build().name in ("torchvision's FCOS", "torchvision's RetinaNet")


def test_labels_outside_the_classes_are_no_targets():
    labels = torch.tensor([[0, 2, 3, -1]])
    found = one_hot_targets(torch.zeros(1, 4, 3), labels)
    assert found.tolist() == [[[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("build", "changes", "match"),
    [
        (fcos, {"sizes_of_interest": [1.0]}, r"sizes_of_interest = .*must have 4 values"),
        (fcos, {"sizes_of_interest": [9.0, 8.0, 90.0, 99.0]}, "must be ascending"),
        (fcos, {"focal_loss_gamma": 0.5}, "gamma = 0.5"),
        (fcos, {"quality": "size"}, "quality = 'size'"),
        (fcos, {"common": {**COMMON, "fpn": FPNOptions(out_channels=32)}}, "at least 64"),
        (retinanet, {"common": {**COMMON, "fpn": FPNOptions(out_channels=48)}}, "multiple of 32"),
        (retinanet, {"iou_thresholds": [0.5]}, "must have 2 values"),
        (retinanet, {"iou_thresholds": [0.5, 0.4]}, "must be ascending"),
        (retinanet, {"norm": "BN"}, "norm = 'BN'"),
        (retinanet, {"anchors": AnchorOptions(sizes=[[9.0]])}, "1 lists of anchor sizes"),
    ],
)
def test_wrong_arguments_are_refused(build, changes, match):
    with pytest.raises(ValueError, match=match):
        build(**changes)


def test_retinanet_without_group_norm_takes_any_width():
    common = {**COMMON, "fpn": FPNOptions(out_channels=8)}
    detector = retinanet(common=common, norm="")
    assert not [x for x in detector.modules() if isinstance(x, nn.GroupNorm)]
    assert all(x > 0 for x in detector(IMAGES, SupervisedLoss(TARGETS)).values())


@pytest.mark.parametrize("build", BUILDERS)
def test_weights_move_between_detectors_of_the_same_classes(tmp_path, build):
    trained, detector = build(), build()
    with torch.no_grad():
        for x in trained.parameters():
            x.add_(0.01)
    torch.save({"student": trained.state_dict()}, tmp_path / "x.pth")
    detector.load_weights(str(tmp_path / "x.pth"))
    for name, x in trained.state_dict().items():
        assert torch.equal(detector.state_dict()[name], x)
    name = detector.classifier
    state = trained.state_dict()
    state[name] = torch.cat([state[name], state[name]])
    torch.save(state, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match="was trained on 6 classes, the model has 3"):
        detector.load_weights(str(tmp_path / "y.pth"))


SMALL = {**COMMON, "detections": DetectionOptions(detections_per_image=30)}


LITE = {"backbone": BackboneOptions(name="timm:tf_efficientnet_lite0", freeze_at=0)}


@pytest.mark.parametrize("build", BUILDERS)
def test_they_train_on_bodies_of_timm(build):
    detector = build(common={**COMMON, **LITE})
    sum(detector(IMAGES, SupervisedLoss(TARGETS)).values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    "changes", [{}, {"image": ImageOptions(format="BGR")}, LITE], ids=["RGB", "BGR", "timm"]
)
def test_the_printed_lines_make_a_torchvision_model_with_equal_detections(tmp_path, build, changes):
    detector = build(common={**SMALL, **changes}, score_thresh_test=0.05)
    names = {}
    exec(detector.export(tmp_path / "exported.pth", min_size=96, max_size=128), names)
    model = names["model"]
    assert type(model).__module__.startswith("torchvision.")
    # Neither edge is a multiple of 128: torchvision's own points of p6 and p7 would be elsewhere.
    (image,) = images((96, 128))
    (ours,) = detector.detect([image])
    with torch.no_grad():
        plain = model([image / 255])[0]
    assert len(ours) == 30
    assert plain["labels"].tolist() == ours.labels.tolist()
    torch.testing.assert_close(ours.scores, plain["scores"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.boxes, plain["boxes"], rtol=1e-3, atol=2e-2)


def test_a_scale_below_0_cannot_be_exported(tmp_path):
    detector = fcos()
    with torch.no_grad():
        detector.head.regression_head.scales[2] = -0.5
    with pytest.raises(UserError, match="the scale of a level is not positive"):
        detector.export(tmp_path / "x.pth", min_size=96, max_size=128)
    assert not (tmp_path / "x.pth").exists()


class TwoRanks(Group):
    """A group whose other process has found as many positive locations as is said."""

    def __init__(self, other):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def mean(self, number):
        return (number + self.other) / 2


@pytest.mark.parametrize("build", BUILDERS)
def test_losses_are_divided_by_the_mean_of_positive_locations_over_ranks(build):
    detector = build()
    alone = detector(IMAGES, SupervisedLoss(TARGETS))
    detector.group = TwoRanks(0)
    shared = detector(IMAGES, SupervisedLoss(TARGETS))
    for name, loss in alone.items():
        assert shared[name].item() == pytest.approx(2 * loss.item(), rel=1e-5)


def gradients(detector, student, pictures, targets):
    losses = student(pictures, SupervisedLoss(targets))
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters()}


def exchanged_gradients(rank):
    """Of one image on each rank, of which one has boxes."""
    detector = fcos(common={**COMMON, "resnets": ResNetOptions(depth=18, norm="FrozenBN")})
    detector.group = Group(rank, 2)
    student = DistributedDataParallel(detector, broadcast_buffers=False)
    pictures = images((64, 96), (64, 96))
    return gradients(detector, student, pictures[rank : rank + 1], TARGETS[rank : rank + 1])


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_their_batch_on_one(tmp_path):
    found = on_two_ranks(exchanged_gradients, tmp_path)
    detector = fcos()
    expected = gradients(detector, detector, images((64, 96), (64, 96)), TARGETS)
    for name, gradient in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
def test_a_few_images_are_learned_by_heart(build):
    common = {**COMMON, "resnets": ResNetOptions(depth=18, norm="BN")}
    detector = build(common=common, prior_prob=0.01, initial=True)
    scenes, labels = [], []
    for number, (x, y) in enumerate([(8, 8), (30, 10), (12, 28), (26, 26)]):
        image = torch.full((3, 64, 64), 40, dtype=torch.uint8)
        image[:, y : y + 24, x : x + 24] = 220
        if number % 2:
            image[:, y + 6 : y + 18, x + 6 : x + 18] = 40
        scenes.append(image)
        box = torch.tensor([[x, y, x + 24, y + 24]], dtype=torch.float32)
        labels.append(Targets(box, torch.tensor([number % 2])))
    optimizer = torch.optim.AdamW(detector.parameters())
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 60)
        optimizer.zero_grad()
        sum(detector(scenes, SupervisedLoss(labels)).values()).backward()
        optimizer.step()
    for found, target in zip(detector.detect(scenes), labels, strict=True):
        assert found.labels[0] == target.labels[0]
        assert box_iou(found.boxes[:1], target.boxes).item() > 0.7
