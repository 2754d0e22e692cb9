import torch

from ssod_imwa.detection.data.records import Detections, View
from ssod_imwa.detection.label_pictures import draw_labels


def view(height, width):
    return View(torch.zeros(3, height, width, dtype=torch.uint8), torch.eye(3).double(), None)


def label(corners):
    return Detections(torch.tensor([corners]), torch.tensor([1]), torch.tensor([0.9]))


def test_boxes_are_drawn_where_they_are_and_small_views_are_enlarged():
    """A view of 80 px is enlarged four times; the sheet has a margin of 4 px."""
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0))
    sheet = draw_labels([view(80, 100), view(80, 90)], [label([20.0, 40, 60, 70]), nothing], "ab")
    assert sheet.shape == (3, 320 + 8, 2 * 404 + 4)
    yellow = (sheet == torch.tensor([255, 255, 0]).view(3, 1, 1)).all(0)
    rows, columns = yellow.nonzero().unbind(1)
    assert abs(columns.min() - (4 + 80)) <= 2
    assert abs(columns.max() - (4 + 240)) <= 2
    assert abs(rows.max() - (4 + 280)) <= 2
