import contextlib
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssod_imwa.detection.coco_ap import coco_metrics, coco_truth
from ssod_imwa.detection.data.records import Annotations, Detections

CLASSES = ("cat", "dog", "owl")


def annotations(boxes=(), labels=(), crowd=(), difficult=()):
    n = len(boxes)
    return Annotations(
        boxes=np.asarray(boxes, dtype=np.float32).reshape(n, 4),
        labels=np.asarray(labels, dtype=np.int64),
        crowd=np.asarray(crowd if len(crowd) else [False] * n, dtype=bool),
        difficult=np.asarray(difficult if len(difficult) else [False] * n, dtype=bool),
    )


def detections(boxes=(), labels=(), scores=()):
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(scores, dtype=torch.float32),
    )


def random_boxes(rng, n):
    corner = rng.uniform(0, 250, size=(n, 2))
    return np.concatenate([corner, corner + rng.uniform(4, 180, size=(n, 2))], axis=1)


def random_scene(rng, *, images=40):
    """Jittered copies of the truth plus noise, with crowds, difficult boxes and empty images."""
    truths, predictions = [], []
    for i in range(images):
        n = 0 if i % 7 == 0 else int(rng.integers(1, 7))
        boxes, labels = random_boxes(rng, n), rng.integers(0, 2 if i % 2 else 3, size=n)
        crowd = rng.random(n) < 0.15
        difficult = (rng.random(n) < 0.2) & ~crowd
        truths.append(annotations(boxes, labels, crowd, difficult))
        copies = rng.integers(0, 4, size=n)
        near = np.repeat(boxes, copies, axis=0)
        near = near + rng.normal(0, 6, size=near.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        noise = 0 if i % 5 == 0 else int(rng.integers(0, 130))
        found = np.concatenate([near, random_boxes(rng, noise)])
        found_labels = np.concatenate([np.repeat(labels, copies), rng.integers(0, 3, size=noise)])
        # Two decimals make ties, as many detectors' saturated scores do.
        scores = np.concatenate([rng.uniform(0.3, 1, len(near)), rng.uniform(0, 0.6, noise)])
        predictions.append(
            detections(
                found.tolist(),
                found_labels.astype(int).tolist(),
                scores.round(2).tolist(),
            )
        )
    return truths, predictions


def pycocotools_stats(truths, predictions, classes=CLASSES):
    results = []
    for image_id, found in enumerate(predictions):
        for (x1, y1, x2, y2), label, score in zip(
            found.boxes.double().tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append(
                {"image_id": image_id, "bbox": box, "category_id": label + 1, "score": score}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_truth(truths, classes=classes)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    per_class = evaluator.eval["precision"][:, :, :, 0, -1]
    per_class = [per_class[:, :, k] for k in range(len(classes))]
    return [100 * x for x in evaluator.stats[:6]] + [
        100 * x[x > -1].mean() if (x > -1).any() else math.nan for x in per_class
    ]


@pytest.mark.parametrize("seed", range(4))
def test_all_figures_equal_those_of_pycocotools(seed):
    truths, predictions = random_scene(np.random.default_rng(seed))
    metrics = coco_metrics(truths, predictions, classes=CLASSES)
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl"] + [
        f"AP-{name}" for name in CLASSES
    ]
    expected = pycocotools_stats(truths, predictions)
    np.testing.assert_allclose(list(metrics.values()), expected, rtol=0, atol=1e-9)
    assert 5 < metrics["AP"] < metrics["AP50"] < 95


def test_values_made_by_hand():
    truths = [annotations([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0])]
    # One exact find, one of IoU 0.5 exactly (which COCO counts at 0.5): AP50 1, at 0.55.. recall
    # 1/2 with precision 1, which is 51 of COCO's 101 recall points.
    found = [detections([[0, 0, 10, 10], [20, 20, 40, 30]], [0, 0], [0.9, 0.8])]
    metrics = coco_metrics(truths, found, classes=("cat",))
    assert metrics["AP50"] == pytest.approx(100)
    assert metrics["AP75"] == pytest.approx(100 * 51 / 101)
    assert metrics["AP"] == metrics["AP-cat"] == pytest.approx(100 * (1 + 9 * 51 / 101) / 10)


def test_difficult_boxes_neither_help_nor_hurt():
    boxes, labels = [[0, 0, 10, 10], [50, 50, 80, 80]], [0, 0]
    found = [detections(boxes[::-1], labels, [0.9, 0.8])]
    only_easy = [annotations(boxes[:1], labels[:1])]
    with_difficult = [annotations(boxes, labels, difficult=[False, True])]
    without = [detections(boxes[:1], labels[:1], [0.8])]
    assert coco_metrics(with_difficult, found, classes=("cat",))["AP"] == pytest.approx(100)
    assert coco_metrics(with_difficult, without, classes=("cat",))["AP"] == pytest.approx(100)
    assert coco_metrics(only_easy, found, classes=("cat",))["AP"] == pytest.approx(50)


def test_a_crowd_takes_any_number_of_detections():
    truths = [annotations([[0, 0, 10, 10], [20, 0, 60, 40]], [0, 0], crowd=[False, True])]
    inside = [[22, 2, 30, 10], [32, 2, 40, 10], [42, 2, 50, 10]]
    found = [detections([*inside, [0, 0, 10, 10]], [0] * 4, [0.9, 0.9, 0.9, 0.5])]
    assert coco_metrics(truths, found, classes=("cat",))["AP"] == pytest.approx(100)


def test_nothing_found_is_zero_and_a_class_without_objects_is_nan():
    truths = [annotations([[0, 0, 50, 50]], [0]), annotations()]
    metrics = coco_metrics(truths, [detections(), detections()], classes=("cat", "dog"))
    assert metrics["AP"] == metrics["AP50"] == metrics["APm"] == metrics["AP-cat"] == 0
    assert all(math.isnan(metrics[name]) for name in ("APs", "APl", "AP-dog"))


def test_no_objects_at_all_is_nan():
    found = [detections([[0, 0, 5, 5]], [0], [0.5])]
    assert all(map(math.isnan, coco_metrics([annotations()], found, classes=("cat",)).values()))


def test_does_not_write_to_the_terminal(capsys):
    coco_metrics([annotations([[0, 0, 5, 5]], [0])], [detections()], classes=("cat",))
    assert capsys.readouterr() == ("", "")


def test_size_ranges_go_by_the_masks_area_where_it_is_known():
    truth = annotations([[0, 0, 40, 40]], [0])
    found = detections([[0, 0, 40, 40]], [0], [0.9])
    by_box = coco_metrics([truth], [found], classes=CLASSES)
    by_mask = coco_metrics(
        [dataclasses.replace(truth, area=np.array([500.0]))], [found], classes=CLASSES
    )
    assert by_box["APm"] == by_mask["APs"] == 100
    assert math.isnan(by_box["APs"])
    assert math.isnan(by_mask["APm"])
