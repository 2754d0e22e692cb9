import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from ssod_imwa.detection.data.records import Annotations, Detections
from ssod_imwa.detection.voc_ap import (
    average_precision,
    average_precision_11_point,
    voc_metrics,
)


def annotations(boxes=(), labels=(), difficult=None, crowd=None):
    n = len(boxes)
    return Annotations(
        boxes=np.asarray(boxes, dtype=np.float32).reshape(n, 4),
        labels=np.asarray(labels, dtype=np.int64),
        crowd=np.zeros(n, dtype=bool) if crowd is None else np.asarray(crowd),
        difficult=np.zeros(n, dtype=bool) if difficult is None else np.asarray(difficult),
    )


def detections(boxes=(), labels=(), scores=()):
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
    )


def inclusive_iou(a, b):
    """The devkit's IoU: 1-based inclusive pixels, every side is last - first + 1."""
    a = [a[0] + 1, a[1] + 1, a[2], a[3]]
    b = [b[0] + 1, b[1] + 1, b[2], b[3]]
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def brute_force_curve(truths, predictions, label, threshold):
    """Recall and precision by plain loops over detections in order of score."""
    todo = []
    for image, found in enumerate(predictions):
        for box, found_label, score in zip(
            found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        ):
            if found_label == label:
                todo.append((score, image, box))
    todo.sort(key=lambda item: -item[0])
    objects = 0
    for truth in truths:
        for i in range(len(truth)):
            objects += truth.labels[i] == label and not (truth.difficult[i] or truth.crowd[i])
    taken, right, wrong, recall, precision = set(), 0, 0, [], []
    for _, image, box in todo:
        truth = truths[image]
        best, best_iou = None, threshold
        for i in range(len(truth)):
            iou = inclusive_iou(box, truth.boxes[i].tolist())
            if truth.labels[i] == label and iou > best_iou:
                best, best_iou = i, iou
        if best is not None and (truth.difficult[best] or truth.crowd[best]):
            continue
        if best is not None and (image, best) not in taken:
            taken.add((image, best))
            right += 1
        else:
            wrong += 1
        recall.append(right / objects if objects else math.nan)
        precision.append(right / (right + wrong))
    return objects, recall, precision


def brute_force_11_point(recall, precision):
    total = 0.0
    for point in np.arange(0.0, 1.1, 0.1):
        total += max((p for r, p in zip(recall, precision, strict=True) if r >= point), default=0.0)
    return total / 11


def brute_force_all_points(recall, precision):
    total, last = 0.0, 0.0
    for i, r in enumerate(recall):
        if r > last:
            total += (r - last) * max(precision[i:])
            last = r
    return total


def random_scene(seed, *, images=25, num_classes=4):
    """Integer pixels as in VOC; the last class has objects but only difficult ones."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], []
    for i in range(images):
        n = 0 if i % 6 == 0 else int(rng.integers(1, 6))
        corner = rng.integers(0, 200, size=(n, 2))
        boxes = np.concatenate([corner, corner + rng.integers(5, 120, size=(n, 2))], axis=1)
        labels = rng.integers(0, num_classes, size=n)
        difficult = (rng.random(n) < 0.25) | (labels == num_classes - 1)
        truths.append(annotations(boxes, labels, difficult, crowd=rng.random(n) < 0.1))
        copies = rng.integers(0, 4, size=n)
        found = np.repeat(boxes, copies, axis=0) + rng.integers(-8, 9, size=(copies.sum(), 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_labels = np.repeat(labels, copies)
        predictions.append(
            detections(found.tolist(), found_labels.tolist(), rng.random(len(found)).tolist())
        )
    return truths, predictions


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_plain_loops_with_the_devkits_pixel_convention(seed):
    truths, predictions = random_scene(seed)
    all_points, eleven = [], []
    for label in range(4):
        curves = [brute_force_curve(truths, predictions, label, t / 100) for t in range(50, 100, 5)]
        if curves[0][0]:
            all_points.append(brute_force_all_points(*curves[0][1:]))
            eleven.append([brute_force_11_point(*curve[1:]) for curve in curves])
    assert len(eleven) == 3  # the class with difficult objects alone does not count
    metrics = voc_metrics(truths, predictions, num_classes=4)
    assert metrics["VOC/AP50"] == pytest.approx(100 * np.mean(all_points), abs=1e-9)
    assert metrics["VOC/AP50-11pt"] == pytest.approx(100 * np.mean(eleven, axis=0)[0], abs=1e-9)
    assert metrics["VOC/AP"] == pytest.approx(100 * np.mean(eleven), abs=1e-9)
    assert 5 < metrics["VOC/AP"] < metrics["VOC/AP50"] < 95


def test_values_made_by_hand():
    truths = [annotations([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0])]
    found = [
        detections(
            [[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]],  # found, found twice, found
            [0, 0, 0],
            [0.9, 0.8, 0.7],
        )
    ]
    metrics = voc_metrics(truths, found, num_classes=1)
    assert metrics["VOC/AP50"] == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))
    # Recall points 0..0.5 reach precision 1, the other five 2/3.
    assert metrics["VOC/AP50-11pt"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    assert metrics["VOC/AP"] == metrics["VOC/AP50-11pt"]


def test_the_threshold_itself_is_not_enough():
    truths = [annotations([[0, 0, 10, 10]], [0])]
    half = [detections([[0, 0, 10, 5]], [0], [0.9])]  # IoU 0.5 exactly
    assert voc_metrics(truths, half, num_classes=1)["VOC/AP50"] == 0
    more = [detections([[0, 0, 10, 5.01]], [0], [0.9])]
    assert voc_metrics(truths, more, num_classes=1)["VOC/AP50"] == pytest.approx(100)


def test_detections_on_a_difficult_box_are_not_counted():
    truths = [annotations([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 0], difficult=[True, False])]
    found = [detections([[0, 0, 10, 10]] * 2 + [[20, 0, 30, 10]], [0, 0, 0], [0.9, 0.8, 0.7])]
    assert voc_metrics(truths, found, num_classes=1)["VOC/AP50"] == pytest.approx(100)


def test_a_box_found_in_one_image_does_not_take_the_same_box_of_another():
    truth, found = annotations([[0, 0, 10, 10]], [0]), detections([[0, 0, 10, 10]], [0], [0.5])
    metrics = voc_metrics([truth, annotations(), truth], [found, found, found], num_classes=1)
    assert metrics["VOC/AP50"] == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    truths = [annotations([[0, 0, 5, 5]], [0])]
    assert set(voc_metrics(truths, [detections()], num_classes=2).values()) == {0.0}
    nothing = voc_metrics([annotations()], [detections()], num_classes=2)
    assert all(math.isnan(value) for value in nothing.values())


def test_a_box_without_area_overlaps_nothing():
    truths = [annotations([[5, 5, 5, 9]], [0])]
    metrics = voc_metrics(truths, [detections([[5, 5, 5, 9]], [0], [1.0])], num_classes=1)
    assert metrics["VOC/AP50"] == 0


def test_area_under_a_falling_curve_equals_scikit_learn():
    # With precision falling from hit to hit the envelope is the curve itself, which is what
    # scikit-learn sums up.
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 0])
    found = np.cumsum(right)
    ours = average_precision(found / right.sum(), found / np.arange(1, 11))
    assert ours == pytest.approx(average_precision_score(right, np.arange(10)[::-1]))


def test_eleven_points_keep_the_step_of_arange():
    recall, precision = np.array([0.1, 0.2, 0.3]), np.array([1.0, 1.0, 1.0])
    assert average_precision_11_point(recall, precision) == pytest.approx(3 / 11)
