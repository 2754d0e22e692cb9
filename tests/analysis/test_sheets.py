import numpy as np
import torch

from ssod_imwa.analysis import sheets
from ssod_imwa.detection.data.geometry import flip_matrix
from ssod_imwa.detection.data.records import Annotations, Detections, Targets, View
from ssod_imwa.visualization.pictures import PALETTE

IMAGE = torch.full((3, 400, 400), 128, dtype=torch.uint8)
BOXES = torch.tensor([[50.0, 100.0, 200.0, 300.0], [220.0, 100.0, 380.0, 300.0]])
FOUND = Detections(BOXES, torch.tensor([0, 1]), torch.tensor([0.9, 0.4]))


def annotations(crowd=(False, False), difficult=(False, False)):
    return Annotations(BOXES.numpy(), np.array([0, 1]), np.array(crowd), np.array(difficult))


def amount(picture, label):
    color = torch.tensor(PALETTE[label], dtype=torch.uint8)[:, None, None]
    return int((picture == color).all(0).sum())


def captions_of(monkeypatch, function, *args, **kwargs):
    """What a sheet says, and the pictures it is made of."""
    seen = {}

    def remember(pictures, captions, *, group):
        seen.update(pictures=pictures, captions=captions, group=group)
        return IMAGE

    monkeypatch.setattr(sheets, "contact_sheet", remember)
    function(*args, **kwargs)
    return seen


def test_only_detections_above_the_threshold_are_drawn():
    one = sheets.detections_picture(IMAGE, FOUND, ("cat", "dog"), threshold=0.5)
    both = sheets.detections_picture(IMAGE, FOUND, ("cat", "dog"), threshold=0.3)
    assert amount(one, 0) > 0
    assert amount(one, 1) == 0
    assert amount(both, 1) > 0


def test_difficult_and_crowd_boxes_say_so():
    plain = sheets.truth_picture(IMAGE, annotations(), ("cat", "dog"))
    noted = sheets.truth_picture(
        IMAGE, annotations(crowd=(True, False), difficult=(False, True)), ("cat", "dog")
    )
    assert amount(noted, 0) > amount(plain, 0)
    assert amount(noted, 1) > amount(plain, 1)


def test_a_prediction_sheet_has_truth_beside_detections(monkeypatch):
    seen = captions_of(
        monkeypatch,
        sheets.prediction_sheet,
        [IMAGE],
        [annotations()],
        [FOUND],
        ["0001"],
        class_names=("cat", "dog"),
        threshold=0.5,
    )
    assert seen["captions"] == ["image 0001: 2 labeled", "1 found with a score above 0.5"]
    assert amount(seen["pictures"][0], 1) > 0
    assert amount(seen["pictures"][1], 1) == 0
    assert seen["group"] == 2  # truth and detections stay side by side


def test_a_prediction_sheet_is_a_picture():
    sheet = sheets.prediction_sheet(
        [IMAGE], [annotations()], [FOUND], ["a"], class_names=("cat", "dog"), threshold=0.5
    )
    assert sheet.dtype == torch.uint8
    assert amount(sheet, 0) > 100


def test_a_view_sheet_has_labels_or_pseudo_labels_on_both_views(monkeypatch):
    labeled = View(IMAGE, torch.eye(3), Targets(BOXES[:1], torch.tensor([0])))
    unlabeled = View(IMAGE, torch.eye(3), None)
    seen = captions_of(
        monkeypatch,
        sheets.view_sheet,
        [{"weak": view, "strong": view} for view in (labeled, unlabeled)],
        [None, FOUND],
        ["a", "b"],
        class_names=("cat", "dog"),
    )
    assert seen["captions"] == [
        "image a: weak view, 1 label",
        "strong view",
        "image b: weak view, 2 pseudo-labels",
        "strong view",
    ]
    of_dogs = [amount(picture, 1) for picture in seen["pictures"]]
    assert of_dogs[:2] == [0, 0]
    assert min(of_dogs[2:]) > 0


def test_pseudo_labels_follow_the_geometry_of_the_strong_view(monkeypatch):
    weak = View(IMAGE, torch.eye(3, dtype=torch.float64), None)
    strong = View(IMAGE, flip_matrix(400), None)
    drawn = []

    def remember(image, boxes, labels, class_names, **settings):
        drawn.append(boxes.tolist())
        return image

    monkeypatch.setattr(sheets, "draw_detections", remember)
    views = [{"weak": weak, "strong": strong}]
    sheets.view_sheet(views, [FOUND], ["a"], class_names=("cat", "dog"))
    on_strong = [[200.0, 100.0, 350.0, 300.0], [20.0, 100.0, 180.0, 300.0]]
    assert drawn == [BOXES.tolist(), on_strong]
