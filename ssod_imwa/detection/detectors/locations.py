"""The locations of FCOS, and which box each of them is to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssod_imwa.detection.data.records import Targets


@dataclass(frozen=True)
class Locations:
    """The N locations of an image, level after level, row by row.

    Attributes:
        points: float32 (N, 2), x and y in pixels: the upper left corner of each cell.
        strides: float32 (N,), the edge of the cell in pixels.
        levels: number of locations of each level.
    """

    points: torch.Tensor
    strides: torch.Tensor
    levels: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """What each of N locations is to predict.

    Attributes:
        labels: int64 (N,), the class, or C for background.
        boxes: float32 (N, 4); of no meaning for background.
    """

    labels: torch.Tensor
    boxes: torch.Tensor


def grid_locations(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
) -> Locations:
    """The locations of maps of these heights and widths, which stand `strides` pixels apart.

    Example:
        >>> grid_locations([(1, 2)], [8], torch.device("cpu")).points
        tensor([[0., 0.],
                [8., 0.]])
    """
    points = []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(
            torch.arange(0, height * stride, stride, device=device),
            torch.arange(0, width * stride, stride, device=device),
            indexing="ij",
        )
        points.append(torch.stack([x, y], dim=-1).flatten(0, 1).float())
    levels = tuple(len(level) for level in points)
    of_levels = torch.tensor(strides, dtype=torch.float32, device=device)
    repeats = torch.tensor(levels, device=device)
    return Locations(torch.cat(points), of_levels.repeat_interleave(repeats), levels)


@torch.no_grad()
def assign_locations(
    locations: Locations,
    targets: Targets,
    *,
    bounds: Sequence[float],
    radius: float,
    num_classes: int,
) -> Assignment:
    """The boxes of an image that its locations are to predict.

    A box is predicted by the locations inside it that are less than `radius` strides from its
    center along both axes, on the level whose range holds the largest distance from the location
    to the box's edges. Of several boxes the one with the smallest area wins, and of equal ones the
    first.

    Args:
        locations: of the image.
        targets: its boxes, which may be none.
        bounds: of the levels' ranges in pixels, one less than levels; ranges are closed, and the
            first begins below 0 and the last has no end.
        radius: of center sampling, in strides; 0 takes all locations inside a box.
        num_classes: C.

    Source: FCOS (Tian et al., arXiv 1904.01355, section 3; center sampling of arXiv 2006.09214).
    """
    points, count = locations.points, len(locations.points)
    if not len(targets):
        background = targets.labels.new_full((count,), num_classes)
        return Assignment(background, points.new_zeros(count, 4))
    start, end = targets.boxes.split(2, dim=1)
    # (N, boxes, 4): distances to the left, upper, right and lower edge.
    distances = torch.cat([points[:, None] - start, end - points[:, None]], dim=2)
    matches = distances.amin(2) > 0
    if radius > 0:
        from_center = (points[:, None] - (start + end) / 2).abs().amax(2)
        matches &= from_center < radius * locations.strides[:, None]
    edges = points.new_tensor([-1.0, *bounds, float("inf")])
    repeats = torch.tensor(locations.levels, device=points.device)
    low, high = (x.repeat_interleave(repeats)[:, None] for x in (edges[:-1], edges[1:]))
    farthest = distances.amax(2)
    matches &= (farthest >= low) & (farthest <= high)
    areas = (end - start).prod(1).expand(count, -1)
    smallest, box = torch.where(matches, areas, float("inf")).min(1)
    labels = torch.where(smallest.isinf(), num_classes, targets.labels[box])
    return Assignment(labels, targets.boxes[box])


def centerness(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How near points (n, 2) inside boxes (n, 4) are to their centers, in (0, 1].

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of the distances to the edges.

    Source: FCOS (arXiv 1904.01355, equation 3).

    Example:
        >>> centerness(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0, 5.0, 4.0]]))
        tensor([0.5000])
    """
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    ratios = torch.minimum(before, after) / torch.maximum(before, after)
    return ratios.prod(1).sqrt()
