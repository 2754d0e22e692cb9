from dataclasses import replace

import numpy as np

from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.reports import box_lines, class_counts, class_lines
from ssod_imwa.detection.data.split_reports import split_lines


def dataset():
    """One labeled image, two boxes of "owl", one of them a crowd, and one that has no labels."""
    annotations = Annotations(
        np.zeros((4, 4), np.float32),
        np.array([0, 2, 2, 0]),
        np.array([False, False, True, False]),
        np.array([True, False, False, False]),
    )
    records = (ImageRecord("a", 1, 9, 9, annotations), ImageRecord("b", 2, 9, 9))
    return DetectionDataset("birds", records, ("cat", "dog", "owl"))


def test_class_counts_leave_crowds_and_unlabeled_images_out():
    assert class_counts(dataset()) == [2, 0, 1]


def test_of_each_class_there_are_images_boxes_difficult_ones_and_crowds():
    rows = [line.split() for line in class_lines(dataset())]
    assert rows == [
        ["class", "images", "boxes", "difficult", "crowds"],
        ["cat", "1", "2", "1", "0"],
        ["dog", "0", "0", "0", "0"],
        ["owl", "1", "1", "0", "1"],
    ]


def test_without_labels_or_classes_there_is_nothing_to_count():
    unlabeled = dataset().subset([1])
    assert class_lines(unlabeled) == class_lines(replace(dataset(), classes=())) == ["  no labels"]


def test_a_split_warns_of_classes_that_it_misses():
    line, warning = split_lines("10", "1", dataset())
    assert line.split()[:4] == ["10", "1", "2", "3"]
    assert line.endswith("cat:2 dog:0 owl:1")
    assert warning == "warning: no labeled box of dog; another fold may have some"


def test_edges_of_boxes_are_shown_in_pixels_and_as_shares_of_their_image():
    """A box of 4 x 9 on an image of 20 x 10: its edge is 6, 60 % of 10."""
    boxes = np.array([[1, 0, 5, 9], [0, 0, 20, 10], [3, 3, 3, 5]], np.float32)
    flags = np.array([False, True, False])
    annotations = Annotations(boxes, np.array([0, 0, 0]), flags, np.zeros(3, bool))
    birds = DetectionDataset("birds", (ImageRecord("a", 1, 20, 10, annotations),), ("owl",))
    (line,) = box_lines(birds)
    assert "edge 6, 6, 6 px, 60, 60, 60 % of" in line
    assert line.endswith("height over width 2.25, 2.25, 2.25")
    assert box_lines(birds.subset([0], labeled=False)) == box_lines(dataset()) == []
