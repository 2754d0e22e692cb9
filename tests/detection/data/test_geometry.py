import math

import numpy as np
import pytest
import torch

from ssod_imwa.detection.data.geometry import (
    between,
    flip_matrix,
    is_identity,
    map_boxes,
    map_targets,
    resized_shape,
    scale_matrix,
)
from ssod_imwa.detection.data.records import Annotations, View


def rotation(degrees, center):
    angle = math.radians(degrees)
    turn = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle), 0],
            [math.sin(angle), math.cos(angle), 0],
            [0, 0, 1],
        ],
        dtype=torch.float64,
    )
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = torch.tensor(center, dtype=torch.float64)
    return shift @ turn @ torch.linalg.inv(shift)


PERSPECTIVE = torch.tensor(
    [[1.0, 0.1, 2.0], [0.05, 0.9, 1.0], [1e-3, 2e-3, 1.0]], dtype=torch.float64
)


def random_boxes(n=40, size=100.0):
    corners = np.random.default_rng(0).uniform(0, size, (n, 2, 2))
    return torch.from_numpy(
        np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    )


def hull_by_loops(box, matrix, height, width):
    xs, ys = [], []
    for x in (box[0], box[2]):
        for y in (box[1], box[3]):
            u, v, w = (sum(matrix[i][j] * c for j, c in enumerate((x, y, 1.0))) for i in range(3))
            xs.append(min(max(u / w, 0), width))
            ys.append(min(max(v / w, 0), height))
    return [min(xs), min(ys), max(xs), max(ys)]


@pytest.mark.parametrize(
    "matrix",
    [scale_matrix(0.5, 2.0), flip_matrix(100), rotation(30, (50, 40)), PERSPECTIVE],
    ids=["scale", "flip", "rotation", "perspective"],
)
def test_boxes_are_hulls_of_their_moved_corners(matrix):
    boxes = random_boxes()
    moved = map_boxes(boxes, matrix, height=90, width=80)
    for box, result in zip(boxes.tolist(), moved.tolist(), strict=True):
        assert result == pytest.approx(hull_by_loops(box, matrix.tolist(), 90, 80), abs=1e-4)


@pytest.mark.parametrize(
    "matrix",
    [scale_matrix(1.7, 1.3), flip_matrix(170) @ scale_matrix(1.7, 1.7), rotation(90, (50, 50))],
    ids=["scale", "scale and flip", "quarter turn"],
)
def test_boxes_return_through_the_inverse(matrix):
    boxes = random_boxes()
    there = map_boxes(boxes, matrix, height=170, width=170)
    back = map_boxes(there, torch.linalg.inv(matrix), height=100, width=100)
    torch.testing.assert_close(back, boxes, atol=1e-4, rtol=0)


def test_hull_of_a_rotated_box_contains_it():
    boxes = random_boxes()
    turned = map_boxes(boxes, rotation(20, (50, 50)), height=1e9, width=1e9)
    back = map_boxes(turned, rotation(-20, (50, 50)), height=1e9, width=1e9)
    kept = (turned[:, :2] > 0).all(dim=1)  # the others were clipped
    assert kept.sum() > 10
    assert (back[kept, :2] <= boxes[kept, :2] + 1e-3).all()
    assert (back[kept, 2:] >= boxes[kept, 2:] - 1e-3).all()


def test_no_boxes_stay_no_boxes():
    assert map_boxes(torch.zeros(0, 4), flip_matrix(5), height=5, width=5).shape == (0, 4)


def test_targets_leave_out_crowds_and_boxes_without_area_but_keep_difficult_ones():
    annotations = Annotations(
        boxes=np.array(
            [[0, 0, 10, 10], [1, 1, 5, 5], [3, 3, 3, 9], [50, 0, 60, 10], [2, 2, 8, 8]],
            dtype=np.float32,
        ),
        labels=np.array([0, 1, 2, 3, 4]),
        crowd=np.array([False, True, False, False, False]),
        difficult=np.array([False, False, False, False, True]),
    )
    targets = map_targets(annotations, scale_matrix(2, 2), height=40, width=40)
    assert targets.boxes.tolist() == [[0, 0, 20, 20], [4, 4, 16, 16]]
    assert targets.labels.tolist() == [0, 4]
    assert (targets.boxes.dtype, targets.labels.dtype) == (torch.float32, torch.int64)


def test_targets_of_an_image_without_boxes():
    nothing = np.zeros(0, dtype=bool)
    annotations = Annotations(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), nothing, nothing)
    targets = map_targets(annotations, scale_matrix(2, 2), height=4, width=4)
    assert targets.boxes.shape == (0, 4)
    assert targets.labels.shape == (0,)


@pytest.mark.parametrize(
    ("height", "width", "min_size", "max_size", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),  # detectron2's figures for these shapes
        (640, 480, 800, 1333, (1067, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (375, 500, 600, 1333, (600, 800)),
        (200, 1000, 800, 1333, (267, 1333)),
        (128, 128, 128, 128, (128, 128)),
        (1, 5000, 800, 1333, (1, 1333)),
    ],
)
def test_shortest_edge_within_the_longest(height, width, min_size, max_size, expected):
    assert resized_shape(height, width, min_size=min_size, max_size=max_size) == expected


def view(matrix, *, height=100, width=100):
    return View(torch.empty(3, height, width), matrix, None)


def test_the_matrix_between_views_maps_pixels_of_one_to_those_of_the_other():
    weak, strong = rotation(30, (50, 40)) @ scale_matrix(2, 3), flip_matrix(80) @ PERSPECTIVE
    point = torch.tensor([12.0, 34.0, 1.0], dtype=torch.float64)
    on_weak, on_strong = weak @ point, strong @ point
    moved = between(view(weak), view(strong)) @ on_weak
    torch.testing.assert_close(moved[:2] / moved[2], on_strong[:2] / on_strong[2])


def test_views_of_the_same_geometry_are_exactly_the_identity_apart():
    matrix = rotation(30, (50, 40)) @ scale_matrix(1 / 3, 0.7)
    assert is_identity(between(view(matrix), view(matrix.clone())))
    assert not is_identity(between(view(matrix), view(flip_matrix(100) @ matrix)))
