"""Average precision as PASCAL VOC defines it, with the figures of detectron2's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssod_imwa.detection.data.records import Annotations, Detections

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""What AP is averaged over: 0.50, 0.55, ..., 0.95."""

# VOC's devkit, and detectron2 after it, measure 1-based inclusive pixels: a box [xmin, xmax] is
# xmax - xmin + 1 wide. Our boxes are 0-based edges, x1 = xmin - 1 and x2 = xmax, so the plain width
# x2 - x1 is that very number, and likewise for every intersection: no +1 is due here.


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the precision envelope (VOC 2010 and later).

    Args:
        recall: (n,), after each detection in order of falling score.
        precision: (n,), likewise.

    Returns:
        AP in [0, 1]; 0 without detections.

    Example:
        >>> average_precision(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 0.75]))
        0.875
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def average_precision_11_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the best precision at recall 0, 0.1, ..., 1 or more (VOC 2007).

    Args:
        recall: (n,), after each detection in order of falling score.
        precision: (n,), likewise.

    Returns:
        AP in [0, 1]; 0 without detections.

    Example:
        >>> average_precision_11_point(np.array([0.5, 0.5]), np.array([1.0, 0.5])) == 6 / 11
        True
    """
    # arange's third point is 0.30000000000000004, which a recall of 3/10 does not reach. Public
    # figures contain this, so we keep it.
    points = np.arange(0.0, 1.1, 0.1)
    return float(np.mean([precision[recall >= point].max(initial=0.0) for point in points]))


def voc_metrics(
    truths: Sequence[Annotations], predictions: Sequence[Detections], *, num_classes: int
) -> dict[str, float]:
    """VOC's figures in percent, each the mean over the classes that have an object to find.

    An object is found if the detection's best box of that class overlaps it by more than the
    threshold (COCO counts equality, too). What falls on a difficult or crowd box is neither right
    nor wrong. Detections of equal score keep their order; unlike detectron2, which passes through
    text files, nothing is rounded.

    Args:
        truths: labels of each image.
        predictions: detections of each image, in pixels of the stored image.
        num_classes: C.

    Returns:
        `VOC/AP50` from all points, `VOC/AP50-11pt`, and `VOC/AP`, the mean of the 11-point AP over
        `IOU_THRESHOLDS`, which is what detectron2 reports for VOC 2007. NaN if no class has an
        object.
    """
    matches = _match(truths, predictions)
    all_points, eleven_points = [], []
    for label in range(num_classes):
        objects = sum(
            int(np.count_nonzero((truth.labels == label) & ~(truth.difficult | truth.crowd)))
            for truth in truths
        )
        if not objects:
            continue
        of_class = _Matches(*(column[matches.label == label] for column in matches))
        curves = [_curve(of_class, objects, threshold) for threshold in IOU_THRESHOLDS]
        all_points.append(average_precision(*curves[0]))
        eleven_points.append([average_precision_11_point(*curve) for curve in curves])
    if not all_points:
        return dict.fromkeys(("VOC/AP50", "VOC/AP50-11pt", "VOC/AP"), float("nan"))
    return {
        "VOC/AP50": 100 * float(np.mean(all_points)),
        "VOC/AP50-11pt": 100 * float(np.mean(eleven_points, axis=0)[0]),
        "VOC/AP": 100 * float(np.mean(eleven_points)),
    }


class _Matches(NamedTuple):
    """Every detection, by falling score, with the box of its class that it overlaps most."""

    label: np.ndarray
    overlap: np.ndarray
    box: np.ndarray
    optional: np.ndarray
    """Whether that box is difficult or a crowd."""


def _match(truths: Sequence[Annotations], predictions: Sequence[Detections]) -> _Matches:
    # A first, empty image: a data set without images has columns to concatenate, too.
    labels, scores, overlaps = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(0)]
    boxes, optionals = [np.zeros(0, int)], [np.zeros(0, bool)]
    boxes_before = 0
    for truth, found in zip(truths, predictions, strict=True):
        label = found.labels.cpu().numpy()
        iou = _pairwise_iou(found.boxes.cpu().double().numpy(), truth.boxes.astype(np.float64))
        iou[label[:, None] != truth.labels[None, :]] = 0.0
        # A last column that is never above another stands for "no box" in images without any.
        iou = np.pad(iou, ((0, 0), (0, 1)))
        best = iou.argmax(axis=1)
        labels.append(label)
        scores.append(found.scores.cpu().double().numpy())
        overlaps.append(iou.max(axis=1))
        boxes.append(boxes_before + best)
        optionals.append(np.append(truth.crowd | truth.difficult, False)[best])
        boxes_before += iou.shape[1]
    order = np.argsort(-np.concatenate(scores), kind="stable")
    columns = (labels, overlaps, boxes, optionals)
    return _Matches(*(np.concatenate(column)[order] for column in columns))


def _curve(matches: _Matches, objects: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection of one class that counts."""
    hit = matches.overlap > threshold
    right = np.zeros(len(hit), dtype=bool)
    # The first to hit a box finds it; those after it are duplicates and wrong.
    first = np.unique(matches.box[hit], return_index=True)[1]
    right[np.flatnonzero(hit)[first]] = True
    right = right[~(hit & matches.optional)]
    found = np.cumsum(right)
    return found / objects, found / np.arange(1, len(right) + 1)


def _pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, m) from (n, 4) and (m, 4)."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    sides = np.minimum(first[:, None, 2:], second[None, :, 2:]) - corner
    intersection = np.prod(np.maximum(sides, 0.0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - intersection
    # A box without area has no overlap, not an undefined one.
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
