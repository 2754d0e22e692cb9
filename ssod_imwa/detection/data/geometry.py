"""3x3 matrices between the pixels of an image and those of its views, and the boxes they move.

Coordinates are continuous: an image covers [0, width] x [0, height], and pixel i covers [i, i + 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ssod_imwa.detection.data.records import Annotations, Targets, View

# Boxes thinner than this many pixels after mapping have no usable regression target; detectron2
# drops boxes by the same bound.
MIN_BOX_EDGE = 1e-5


def scale_matrix(x: float, y: float) -> torch.Tensor:
    """float64 (3, 3) that multiplies coordinates by x and y."""
    return torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))


def flip_matrix(width: float) -> torch.Tensor:
    """float64 (3, 3) that mirrors an image of this width left to right."""
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[0, 0], matrix[0, 2] = -1.0, width
    return matrix


def shift_matrix(x: float, y: float) -> torch.Tensor:
    """float64 (3, 3) that adds pixels to coordinates."""
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[0, 2], matrix[1, 2] = x, y
    return matrix


def rotation_matrix(degrees: float, center: tuple[float, float]) -> torch.Tensor:
    """float64 (3, 3) that turns clockwise, as the eye sees it, about a center (x, y)."""
    x, y = center
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    return shift_matrix(x, y) @ turn @ shift_matrix(-x, -y)


def shear_matrix(x: float, y: float) -> torch.Tensor:
    """float64 (3, 3) that adds x times the row to the column, then y times that to the row."""
    along_x, along_y = (torch.eye(3, dtype=torch.float64) for _ in range(2))
    along_x[0, 1], along_y[1, 0] = x, y
    return along_y @ along_x


def is_identity(matrix: torch.Tensor) -> bool:
    """Whether a matrix leaves every pixel exactly where it is."""
    return torch.equal(matrix, torch.eye(3, dtype=matrix.dtype))


def between(source: View, target: View) -> torch.Tensor:
    """float64 (3, 3) from pixels of one view to pixels of another view of the same image.

    Exactly the identity where both views share their geometry.

    Example:
        >>> image = torch.zeros(3, 4, 4)
        >>> weak, strong = (View(image, scale_matrix(x, x), None) for x in (2.0, 3.0))
        >>> between(weak, strong).diag()
        tensor([1.5000, 1.5000, 1.0000], dtype=torch.float64)
    """
    if torch.equal(source.matrix, target.matrix):
        return torch.eye(3, dtype=target.matrix.dtype)
    return target.matrix @ torch.linalg.inv(source.matrix)


def map_boxes(
    boxes: torch.Tensor, matrix: torch.Tensor, *, height: float, width: float
) -> torch.Tensor:
    """Move boxes by a matrix: the hull of the four moved corners, clipped to the image.

    Args:
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        matrix: (3, 3), maps homogeneous pixels; `torch.linalg.inv` of a view's matrix maps back.
        height: of the image that the boxes are moved into, in pixels.
        width: likewise.

    Returns:
        (n, 4) of the dtype and device of `boxes`, computed in float64. A box that lies outside has
        no area.

    Example:
        >>> map_boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), flip_matrix(10), height=8, width=10)
        tensor([[7., 2., 9., 4.]])
    """
    x = boxes[:, [0, 2, 2, 0]].double()
    y = boxes[:, [1, 1, 3, 3]].double()
    corners = torch.stack([x, y, torch.ones_like(x)])
    x, y, w = (matrix.to(corners) @ corners.flatten(1)).view_as(corners)
    x1, x2 = (x / w).clamp(0, width).aminmax(dim=1)
    y1, y2 = (y / w).clamp(0, height).aminmax(dim=1)
    return torch.stack([x1, y1, x2, y2], dim=1).to(boxes.dtype)


def map_targets(
    annotations: Annotations, matrix: torch.Tensor, *, height: int, width: int
) -> Targets:
    """The boxes to learn in a view: no crowds, and none thinner than `MIN_BOX_EDGE` pixels."""
    wanted = ~annotations.crowd
    boxes = torch.from_numpy(annotations.boxes[wanted].astype(np.float32).reshape(-1, 4))
    labels = torch.from_numpy(annotations.labels[wanted].astype(np.int64))
    boxes = map_boxes(boxes, matrix, height=height, width=width)
    usable = has_area(boxes)
    return Targets(boxes[usable], labels[usable])


def has_area(boxes: torch.Tensor) -> torch.Tensor:
    """Which boxes (n, 4) are not thinner than `MIN_BOX_EDGE`, bool (n,)."""
    return (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_EDGE).all(dim=1)


def resized_shape(height: int, width: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width after the shortest edge became min_size, or the longest max_size if smaller.

    Example:
        >>> resized_shape(480, 640, min_size=800, max_size=1333)
        (800, 1067)
        >>> resized_shape(480, 1000, min_size=800, max_size=1333)
        (640, 1333)
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))
