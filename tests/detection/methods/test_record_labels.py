"""What methods count of a teacher's boxes, beside the truth that the split hid."""

import numpy as np
import pytest
import torch
from detection_toys import LinearDetector

from ssod_imwa.data.batches import Part
from ssod_imwa.detection.data.geometry import flip_matrix, scale_matrix
from ssod_imwa.detection.data.records import Annotations, Detections, View
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.engine.label_statistics import LabelStatistics

STORED = [10.0, 12.0, 30.0, 40.0]  # of an image of 100 x 50 px
VIEWS = {  # the box as views see it
    "enlarged": (scale_matrix(2, 3), [20.0, 36.0, 60.0, 120.0]),
    "mirrored": (flip_matrix(100), [70.0, 12.0, 90.0, 40.0]),
}


def truth(*boxes):
    nothing = np.zeros(len(boxes), bool)
    labels = np.zeros(len(boxes), np.int64)
    return Annotations(np.array(boxes, np.float32).reshape(-1, 4), labels, nothing, nothing)


def recorded(view_name, hidden_truth, *, index=1):
    method = MeanTeacher(LinearDetector(), MeanTeacherOptions())
    method.label_statistics = LabelStatistics(2)
    method.hidden_truth = hidden_truth
    matrix, box = VIEWS[view_name]
    view = View(torch.zeros(3, 150, 200, dtype=torch.uint8), matrix, None)
    boxes = torch.tensor([box, [0.0, 0.0, 5.0, 5.0], box])
    found = Detections(boxes, torch.tensor([0, 0, 1]), torch.tensor([0.9, 0.8, 0.3]))
    part = Part({"weak": [view]}, None, torch.tensor([index]))
    method.record_labels(part, [view], [found], 0.5)
    return method, method.label_statistics.take()


@pytest.mark.parametrize("name", VIEWS)
def test_boxes_are_judged_on_the_stored_image_of_their_position(name):
    _, counts = recorded(name, [truth(), truth(STORED, [60.0, 0.0, 90.0, 30.0])])
    assert counts.used.tolist() == [2, 0]
    assert counts.judged.tolist() == [2, 0]
    assert counts.right.tolist() == [1, 0]
    assert counts.objects.tolist() == [2, 0]
    assert (counts.images, counts.empty) == (1, 0)


@pytest.mark.parametrize("hidden_truth", [(), (truth(STORED), None)])
def test_without_truth_boxes_are_counted_and_not_judged(hidden_truth):
    _, counts = recorded("enlarged", hidden_truth)
    assert counts.used.tolist() == [2, 0]
    assert (counts.judged.sum(), counts.objects.sum()) == (0, 0)


def test_pictures_get_what_passed():
    method, _ = recorded("enlarged", ())
    _, (labels,) = method.last_labels
    assert labels.scores.tolist() == pytest.approx([0.9, 0.8])


def test_nobody_who_looks_costs_nothing():
    method = MeanTeacher(LinearDetector(), MeanTeacherOptions())
    method.record_labels(Part({}, None, torch.tensor([0])), [], [], 0.5)
    assert method.last_labels == ((), ())
