"""From a teacher's detections to labels for the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.ops import box_iou

from ssod_imwa.detection.data.geometry import between, has_area, is_identity, map_boxes
from ssod_imwa.detection.data.records import Detections, Targets, View

# As VOC's metric tells whether two boxes are of one object.
AGREED_IOU = 0.5


def filter_detections(detections: Detections, threshold: float) -> Detections:
    """The detections of one image with a score above the threshold, in the same order.

    Example:
        >>> found = Detections(torch.rand(3, 4), torch.arange(3), torch.tensor([0.9, 0.7, 0.2]))
        >>> filter_detections(found, 0.7).labels
        tensor([0])
    """
    return select_detections(detections, detections.scores > threshold)


def select_detections(detections: Detections, chosen: torch.Tensor) -> Detections:
    """The detections of one image where a bool (n,) is true, in the same order."""
    return Detections(
        detections.boxes[chosen], detections.labels[chosen], detections.scores[chosen]
    )


def agreeing(detections: Detections, others: Detections) -> Detections:
    """The detections of one image that another model shares, in the same order.

    It shares a box if it has one of the same class whose IoU with it is at least `AGREED_IOU`; one
    of its boxes may share several.
    """
    same = detections.labels[:, None] == others.labels[None]
    overlaps = box_iou(detections.boxes, others.boxes) >= AGREED_IOU
    return select_detections(detections, (same & overlaps).any(dim=1))


def larger_than(detections: Detections, edge: float) -> Detections:
    """The detections of one image that are wider and higher than `edge` pixels."""
    sizes = detections.boxes[:, 2:] - detections.boxes[:, :2]
    return select_detections(detections, (sizes > edge).all(dim=1))


def move_detections(detections: Detections, source: View, target: View) -> Detections:
    """Detections on one view of an image as detections on another view of it.

    Boxes are clipped to the view, and those outside it are dropped. Where both views share their
    geometry, the detections are returned as they are.
    """
    matrix = between(source, target)
    if is_identity(matrix):
        return detections
    height, width = target.image.shape[-2:]
    boxes = map_boxes(detections.boxes, matrix, height=height, width=width)
    moved = Detections(boxes, detections.labels, detections.scores)
    return select_detections(moved, has_area(boxes))


def as_targets(detections: Detections) -> Targets:
    """Detections as boxes to learn, each with its class as a hard label."""
    return Targets(detections.boxes.detach(), detections.labels)


def summarize(detections: Sequence[Detections]) -> dict[str, torch.Tensor]:
    """What to watch when self-training goes wrong: how many pseudo-labels, and how sure they are.

    Args:
        detections: the kept detections of each image, at least one image.

    Returns:
        `pseudo_boxes`, the mean number of boxes of an image, and `pseudo_score`, the mean score of
        a box (0 without boxes), as float32 scalars on the detections' device.
    """
    scores = torch.cat([kept.scores for kept in detections]).float()
    count = len(scores)
    return {
        "pseudo_boxes": scores.new_tensor(count / len(detections)),
        "pseudo_score": scores.sum() / max(count, 1),
    }
