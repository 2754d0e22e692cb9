import math

import pytest
import torch
from torchvision.models.detection.fcos import FCOS

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.locations import assign_locations, centerness, grid_locations

STRIDES = (8, 16, 32)
BOUNDS = (20.0, 45.0)
SIZES = [(8, 12), (4, 6), (2, 3)]
CLASSES = 5


def locations():
    return grid_locations(SIZES, STRIDES, torch.device("cpu"))


def random_targets(count, seed, whole):
    """Boxes in 96 x 64 pixels; whole numbers meet points and bounds exactly."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([96.0, 64.0])
    start, end = corners.sort(dim=1).values.unbind(1)
    boxes = torch.cat([start, end + 1], dim=1)
    boxes = boxes.round() if whole else boxes
    return Targets(boxes, torch.randint(CLASSES, (count,), generator=generator))


def assign_by_hand(targets, radius):
    """Label and box number of each location, by the paper's rules, one location at a time."""
    edges = [-1, *BOUNDS, math.inf]
    chosen = []
    for level, ((height, width), stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
        for row in range(height):
            for column in range(width):
                x, y = column * stride, row * stride
                best, best_area = None, math.inf
                for number, (x1, y1, x2, y2) in enumerate(targets.boxes.double().tolist()):
                    distances = (x - x1, y - y1, x2 - x, y2 - y)
                    center = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                    fits = (
                        min(distances) > 0
                        and edges[level] <= max(distances) <= edges[level + 1]
                        and (radius == 0 or center < radius * stride)
                    )
                    area = (x2 - x1) * (y2 - y1)
                    if fits and area < best_area:
                        best, best_area = number, area
                chosen.append(best)
    return chosen


def assign(targets, radius=1.5):
    return assign_locations(locations(), targets, bounds=BOUNDS, radius=radius, num_classes=CLASSES)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("radius", [0.0, 1.5])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_assignment_equals_the_rules_location_by_location(count, radius, whole):
    positive = 0
    for seed in range(5):
        targets = random_targets(count, seed, whole)
        assigned = assign(targets, radius)
        expected = assign_by_hand(targets, radius)
        labels = [CLASSES if n is None else int(targets.labels[n]) for n in expected]
        assert assigned.labels.tolist() == labels
        for number, box in zip(expected, assigned.boxes, strict=True):
            if number is not None:
                assert torch.equal(box, targets.boxes[number])
                positive += 1
    assert positive > 0


def test_without_boxes_everything_is_background():
    assigned = assign(Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    assert assigned.labels.tolist() == [CLASSES] * 126
    assert assigned.boxes.shape == (126, 4)


def test_of_equal_boxes_the_first_wins():
    box = torch.tensor([[10.0, 10, 40, 40]]).repeat(2, 1)
    assert set(assign(Targets(box, torch.tensor([3, 1]))).labels.tolist()) == {3, CLASSES}


def test_ranges_of_levels_are_closed():
    """A farthest distance of exactly a bound is learned on both levels."""
    box = torch.tensor([[-4.0, 0.0, 36.0, 32.0]])  # 20 px to the left and to the right of (16, 16)
    assigned = assign(Targets(box, torch.tensor([0])), radius=0)
    of_levels = assigned.labels.split(list(locations().levels))
    assert [int((level == 0).sum()) > 0 for level in of_levels] == [True, True, False]


def test_torchvisions_fcos_assigns_alike():
    """Where no distance is exactly a bound; its bounds are 4 and 8 strides."""
    strides, sizes = (8, 16, 32, 64, 128), [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    points = grid_locations(sizes, strides, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    start = 100 * torch.rand(20, 2, generator=generator)
    boxes = torch.cat([start, start + 2 + 90 * torch.rand(20, 2, generator=generator)], dim=1)
    targets = Targets(boxes, torch.arange(20))
    bounds = (64.0, 128.0, 256.0, 512.0)
    ours = assign_locations(points, targets, bounds=bounds, radius=1.5, num_classes=20)

    half = points.strides[:, None] / 2
    anchors = torch.cat([points.points - half, points.points + half], dim=1)
    seen = {}

    class Head:
        def compute_loss(self, targets, outputs, anchors, matches):
            seen["matches"] = matches[0]
            return {}

    class Model:
        center_sampling_radius = 1.5
        head = Head()

    their_targets = [{"boxes": boxes, "labels": targets.labels}]
    FCOS.compute_loss(Model(), their_targets, {}, [anchors], list(points.levels))
    theirs = torch.where(seen["matches"] < 0, 20, seen["matches"])
    assert (theirs < 20).sum() > 20
    # Among areas that differ by less than float32 can tell from 1e8 torchvision takes the first.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for one, other in zip(ours.labels.tolist(), theirs.tolist(), strict=True):
        assert one == other or abs(areas[one] - areas[other]) < 8


def test_centerness_equals_the_formula_point_by_point():
    generator = torch.Generator().manual_seed(1)
    points = 10 + 20 * torch.rand(30, 2, generator=generator)
    boxes = torch.cat(
        [points - 10 * torch.rand(30, 2), points + 10 * torch.rand(30, 2) + 0.1], dim=1
    )
    expected = []
    for (x, y), (x1, y1, x2, y2) in zip(points.tolist(), boxes.tolist(), strict=True):
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
        expected.append(math.sqrt(ratio))
    assert centerness(points, boxes).tolist() == pytest.approx(expected, rel=1e-3)
    assert centerness(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1, 5, 7]])).item() == 1


def test_grids_have_their_strides():
    found = locations()
    assert found.levels == (96, 24, 6)
    assert found.points[1].tolist() == [8, 0]
    assert found.points[12].tolist() == [0, 8]
    assert found.points[-1].tolist() == [64, 32]
    assert found.strides[[0, 96, 120]].tolist() == [8, 16, 32]
