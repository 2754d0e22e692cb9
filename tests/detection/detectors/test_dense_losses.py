"""The losses of FCOS and RetinaNet against plain loops and torchvision's own."""

import math

import pytest
import torch
from dense_toys import (
    CLASSES,
    IMAGES,
    SIZES,
    TARGETS,
    centerness_by_hand,
    cross_entropy,
    fcos,
    focal_by_hand,
    overlap_by_hand,
    retinanet,
)
from torch import nn
from torchvision.models.detection.fcos import FCOSHead as PlainFCOSHead
from torchvision.models.detection.retinanet import RetinaNet

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.objectives import SupervisedLoss


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


def test_a_box_without_area_teaches_no_anchor_of_retinanet():
    detector = retinanet()
    anchors = detector.parts(IMAGES[:1])._anchors
    box, flat = torch.tensor([[4.0, 4.0, 30.0, 40.0]]), torch.tensor([[48.0, 10.0, 48.0, 30.0]])
    both = Targets(torch.cat([flat, box]), torch.tensor([0, 1]))
    labels = detector.assign(anchors, both).labels
    assert torch.equal(labels, detector.assign(anchors, Targets(box, torch.tensor([1]))).labels)
    none = detector.assign(anchors, Targets(flat, torch.tensor([0]))).labels
    assert (none == CLASSES).all()


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
