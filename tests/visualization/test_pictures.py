import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.visualization.pictures import PALETTE, contact_sheet, draw_detections, save_png

NAMES = ("cat", "dog")


def gray(height, width, value=128):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def drawn(image, boxes, labels, **options):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return draw_detections(image, boxes, torch.tensor(labels, dtype=torch.int64), NAMES, **options)


def colored(picture, label):
    """Where a picture has exactly the color of a class."""
    color = torch.tensor(PALETTE[label], dtype=torch.uint8)[:, None, None]
    return (picture == color).all(0)


def test_a_box_is_drawn_in_its_classs_color_where_it_is():
    picture = drawn(gray(500, 600), [[100, 200, 300, 400]], [1])
    assert picture.shape == (3, 500, 600)
    assert picture.dtype == torch.uint8
    line = colored(picture, 1)
    for y, x in ((250, 100), (250, 300), (400, 200), (200, 299)):
        assert line[y, x], (y, x)
    inside = picture[:, 210:390, 110:290]
    assert (inside == 128).all()  # nothing hides the object
    assert not colored(picture, 0).any()


def test_the_given_image_is_not_changed():
    image = gray(500, 500)
    drawn(image, [[10, 10, 400, 400]], [0])
    assert (image == 128).all()


@pytest.mark.parametrize(("height", "width", "factor"), [(128, 128, 4), (100, 300, 4), (400, 9, 4)])
def test_small_images_are_enlarged_by_a_whole_factor_and_boxes_with_them(height, width, factor):
    picture = drawn(gray(height, width), [[2, 60, 8, 90]], [0])
    assert picture.shape == (3, height * factor, width * factor)
    assert colored(picture, 0)[75 * factor, 2 * factor]
    assert colored(picture, 0)[75 * factor, 8 * factor]


def test_ground_truth_is_dashed_with_gaps_and_detections_are_solid():
    box = [[50, 100, 450, 400]]
    solid = colored(drawn(gray(500, 500), box, [0]), 0)[400, 60:440]
    dashed = colored(drawn(gray(500, 500), box, [0], style="dashed"), 0)[399, 60:440]
    assert solid.all()
    assert 0.3 < dashed.float().mean() < 0.7


def test_scores_and_notes_make_the_tag_longer():
    def tag_width(**options):
        tag = colored(drawn(gray(500, 500), [[100, 200, 110, 210]], [0], **options), 0)
        return int(tag[185:199].any(0).sum())

    plain = tag_width()
    assert plain > 10
    assert tag_width(scores=torch.tensor([0.5])) > plain + 10
    assert tag_width(notes=["difficult"]) > plain + 10


def test_a_tag_stays_on_the_image():
    picture = drawn(gray(500, 500), [[490, 0, 500, 30]], [0], scores=torch.tensor([0.5]))
    assert colored(picture, 0)[5, 440:].any()
    assert colored(picture, 0)[5, 425:].any()


def test_the_highest_score_is_drawn_last():
    boxes = [[100, 100, 300, 300], [100, 100, 300, 300]]
    assert colored(drawn(gray(500, 500), boxes, [0, 1], scores=torch.tensor([0.9, 0.8])), 0)[
        250, 100
    ]
    assert colored(drawn(gray(500, 500), boxes, [0, 1], scores=torch.tensor([0.8, 0.9])), 1)[
        250, 100
    ]


def test_no_boxes_leave_the_image_as_it_is():
    image = torch.randint(0, 255, (3, 450, 420), dtype=torch.uint8)
    assert torch.equal(drawn(image, [], []), image)


def test_colors_repeat_with_more_classes_than_colors():
    names = [str(i) for i in range(20)]
    boxes, labels = torch.tensor([[10.0, 50.0, 200.0, 200.0]]), torch.tensor([len(PALETTE) + 1])
    assert colored(draw_detections(gray(500, 500), boxes, labels, names), 1).any()


@pytest.mark.parametrize(
    ("image", "boxes", "labels", "style", "error", "message"),
    [
        (torch.zeros(3, 9, 9), [], [], "solid", TypeError, "dtype torch.float32"),
        (gray(9, 9)[:1], [], [], "solid", ValueError, r"shape \(1, 9, 9\)"),
        (gray(9, 9), [[1, 1, 2, 2]], [0, 1], "solid", ValueError, r"must be \(2, 4\)"),
        (gray(9, 9), [], [], "dotted", ValueError, "'dotted' is not allowed"),
    ],
)
def test_wrong_arguments_are_named(image, boxes, labels, style, error, message):
    with pytest.raises(error, match=message):
        drawn(image, boxes, labels, style=style)


def test_a_sheet_holds_every_image_in_order():
    values = (10, 60, 110, 160, 210)
    images = [gray(40 + 10 * i, 80, value) for i, value in enumerate(values)]
    sheet = contact_sheet(images, [f"image {i}" for i in range(5)], columns=2, cell=200)
    assert sheet.shape[2] == 2 * 200 + 3 * 5
    centers = {}
    for value in values:
        where = (sheet == value).all(0).nonzero().float()
        assert len(where) >= 0.95 * 200 * 100  # 80 x 40 fits as 200 x 100, the others are higher
        centers[value] = where.mean(0)
    column = [float(centers[value][1]) for value in values]
    row = [float(centers[value][0]) for value in values]
    assert max(column[0::2]) < 205 < min(column[1::2])
    assert row[0] < row[2] < row[4]
    assert (sheet == 255).any()


@pytest.mark.parametrize("count", [8, 9, 20, 50])
@pytest.mark.parametrize(("height", "width"), [(60, 60), (40, 60), (60, 30)])
def test_a_sheet_of_many_pairs_is_about_as_wide_as_high(count, height, width):
    sheet = contact_sheet([gray(height, width)] * 2 * count, ["a"] * 2 * count, group=2, cell=80)
    assert 0.6 < sheet.shape[2] / sheet.shape[1] < 1.7


def test_a_group_stays_in_one_row_and_apart_from_the_next():
    values = (10, 60, 110, 160)
    images = [gray(80, 80, value) for value in values]
    sheet = contact_sheet(images, [""] * 4, group=2, columns=2, cell=80)
    where = [(sheet == value).all(0).nonzero() for value in values]
    assert len({int(found[:, 0].min()) for found in where}) == 1
    left, right = ([int(bound(f[:, 1])) for f in where] for bound in (torch.min, torch.max))
    gaps = [left[i + 1] - right[i] for i in range(3)]
    assert gaps[0] == gaps[2] < gaps[1]


def test_a_long_caption_is_wrapped_and_does_not_run_into_its_neighbor():
    images = [gray(40, 80), gray(40, 80)]
    short = contact_sheet(images, ["a", "b"], columns=2, cell=200)
    long = contact_sheet(images, ["many words " * 8, ""], columns=2, cell=200)
    assert long.shape[1] > short.shape[1]
    text_rows = (long == 0).all(0)
    assert text_rows[:, :205].any()
    assert not text_rows[:, 205:].any()


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 images with 0 captions"):
        contact_sheet([], [], columns=2)
    with pytest.raises(ValueError, match="1 images with 2 captions"):
        contact_sheet([gray(4, 4)], ["a", "b"], columns=2)
    with pytest.raises(ValueError, match="3 images make no groups of 2"):
        contact_sheet([gray(4, 4)] * 3, ["a"] * 3, group=2)


def test_a_png_holds_exactly_the_pixels(tmp_path):
    image = torch.randint(0, 255, (3, 11, 7), dtype=torch.uint8)
    save_png(tmp_path / "new" / "image.png", image)
    read = np.asarray(Image.open(tmp_path / "new" / "image.png"))
    np.testing.assert_array_equal(read, image.permute(1, 2, 0))
