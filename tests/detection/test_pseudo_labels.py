import numpy as np
import pytest
import torch
from dense_toys import overlap_by_hand

from ssod_imwa.detection.data.geometry import flip_matrix, scale_matrix
from ssod_imwa.detection.data.records import Detections, View
from ssod_imwa.detection.data.views import WeakView
from ssod_imwa.detection.pseudo_labels import (
    agreeing,
    as_targets,
    filter_detections,
    move_detections,
    summarize,
)


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


@pytest.mark.parametrize("seed", range(4))
def test_boxes_agree_by_class_and_overlap_pair_by_pair(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        corners = 10 * torch.rand(count, 2, generator=generator)
        edges = 10 + 5 * torch.rand(count, 2, generator=generator)
        labels = torch.randint(2, (count,), generator=generator)
        boxes = torch.cat([corners, corners + edges], dim=1)
        return Detections(boxes, labels, torch.rand(count, generator=generator))

    own, other = draw(8), draw(3)
    expected = [
        score
        for box, label, score in zip(*(x.tolist() for x in vars(own).values()), strict=True)
        if any(
            label == its and overlap_by_hand(box, theirs)[0] >= 0.5
            for theirs, its in zip(other.boxes.tolist(), other.labels.tolist(), strict=True)
        )
    ]
    assert 0 < len(expected) < 8
    assert agreeing(own, other).scores.tolist() == expected


def test_nobody_agrees_without_boxes():
    nothing = detections()
    assert len(agreeing(detections(0.9, 0.8), nothing).scores) == 0
    assert len(agreeing(nothing, detections(0.9)).scores) == 0


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


def view(matrix, *, height=40, width=60):
    return View(torch.empty(3, height, width), matrix, None)


def test_detections_move_to_another_view_clipped_and_without_those_outside():
    boxes = torch.tensor([[1.0, 2.0, 11.0, 12.0], [25.0, 0.0, 50.0, 9.0], [40.0, 0.0, 50.0, 9.0]])
    found = Detections(boxes, torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7]))
    shift = torch.eye(3, dtype=torch.float64)
    shift[0, 2] = -3
    strong = view(shift @ scale_matrix(2, 2), height=80)
    moved = move_detections(found, view(torch.eye(3, dtype=torch.float64)), strong)
    assert moved.boxes.tolist() == [[0, 4, 19, 24], [47, 0, 60, 18]]
    assert moved.labels.tolist() == [0, 1]
    assert moved.scores.tolist() == found.scores[:2].tolist()


def test_detections_stay_the_very_same_where_views_share_their_geometry():
    matrix = flip_matrix(60) @ scale_matrix(1 / 3, 1 / 3)
    found = detections(0.9, 0.8)
    assert move_detections(found, view(matrix), view(matrix.clone())) is found


@pytest.mark.parametrize("seed", range(20))
def test_detections_return_from_any_other_resized_and_mirrored_view(seed):
    """Within 1e-4 of their sizes."""
    generator = np.random.default_rng(seed)
    image = torch.zeros(3, 97, 131, dtype=torch.uint8)
    draw = WeakView(range(40, 300), 1333)
    weak, strong = (View(*draw(image, generator), None) for _ in range(2))
    height, width = weak.image.shape[-2:]
    corners = generator.uniform(0, (width, height), (30, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1).clip(0, [width, height] * 2)
    boxes = torch.from_numpy(boxes).float()
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(1)]
    found = Detections(boxes, torch.arange(len(boxes)), torch.ones(len(boxes)))
    back = move_detections(move_detections(found, weak, strong), strong, weak)
    assert torch.equal(back.labels, found.labels)
    sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    assert ((back.boxes - boxes).abs() <= 1e-4 * sizes).all()
