import pytest
import torch

from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.pseudo_labels import as_targets, filter_detections, summarize


def detections(*scores):
    count = len(scores)
    boxes = torch.arange(4.0 * count).view(count, 4)
    return Detections(boxes, torch.arange(count), torch.tensor(scores))


def test_only_scores_above_the_threshold_are_kept():
    found = detections(0.9, 0.7000001, 0.7, 0.1)
    kept = filter_detections(found, 0.7)
    assert kept.labels.tolist() == [0, 1]
    torch.testing.assert_close(kept.boxes, found.boxes[:2])
    targets = as_targets(kept)
    assert targets.labels is kept.labels
    assert torch.equal(targets.boxes, kept.boxes)


def test_no_detection_gives_no_label():
    kept = filter_detections(detections(0.3), 0.7)
    assert len(as_targets(kept)) == 0
    assert as_targets(kept).boxes.shape == (0, 4)


def test_summary_counts_boxes_of_an_image_and_averages_scores_over_boxes():
    summary = summarize([detections(0.9, 0.8), detections(), detections(0.7), detections()])
    assert summary["pseudo_boxes"].item() == pytest.approx(3 / 4)
    assert summary["pseudo_score"].item() == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_summary_without_boxes_is_zero():
    summary = summarize([detections(), detections()])
    assert {name: value.item() for name, value in summary.items()} == {
        "pseudo_boxes": 0.0,
        "pseudo_score": 0.0,
    }
