import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.detection.data.catalog import read_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.validation import apply_policy, check_readable, find_problems
from ssod_imwa.detection.data.views import read_record
from ssod_imwa.errors import DataError


def annotations(boxes, labels=None, crowd=False):
    count = len(boxes)
    return Annotations(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array([0] * count if labels is None else labels, dtype=np.int64),
        np.full(count, crowd),
        np.zeros(count, dtype=bool),
    )


@pytest.fixture
def dataset(tmp_path, write_image):
    """Three sound images of 40 x 30 with two classes."""
    records = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        write_image(path)
        boxes = [[0, 0, 40, 30], [1, 2, 3, 4]]
        records.append(ImageRecord(str(path), number, 40, 30, annotations(boxes, [0, 1])))
    return DetectionDataset("sound", tuple(records), ("cat", "dog"))


def with_record(dataset, position, **changes):
    records = list(dataset.records)
    records[position] = replace(records[position], **changes)
    return replace(dataset, records=tuple(records))


def kinds(dataset, *, read_pixels=True):
    return [problem.what for problem in find_problems(dataset, read_pixels=read_pixels)]


def test_a_sound_data_set_has_no_problems_and_is_not_changed(dataset):
    assert find_problems(dataset, read_pixels=True) == []
    cleaned = apply_policy(dataset)
    for old, new in zip(dataset.records, cleaned.records, strict=True):
        np.testing.assert_array_equal(old.annotations.boxes, new.annotations.boxes)


BAD_BOXES = [
    ([5, 5, 5, 9], "box without area"),
    ([5, 9, 9, 5], "box without area"),
    ([np.nan, 0, 5, 5], "box is not finite"),
    ([0, 0, np.inf, 5], "box is not finite"),
    ([41, 0, 45, 5], "box outside the image"),
    ([-9, -9, 0, 0], "box outside the image"),
    ([-1.5, 0, 5, 5], "box passes the image's edge"),
    ([0, 0, 40, 32], "box passes the image's edge"),
]


@pytest.mark.parametrize(("box", "what"), BAD_BOXES)
def test_a_bad_box_is_found_and_located(dataset, box, what):
    boxes = annotations([[0, 0, 9, 9], box, [1, 1, 2, 2]], [0, 1, 1])
    broken = with_record(dataset, 1, annotations=boxes)
    (problem,) = find_problems(broken, read_pixels=False)
    assert (problem.what, problem.position, problem.box) == (what, 1, 1)
    assert (problem.file, problem.place) == (dataset.records[1].file_name, "boxes[1] of image 1")


def test_box_checks_agree_with_a_plain_loop(dataset):
    generator = np.random.default_rng(3)
    boxes = generator.integers(-6, 48, (400, 4)).astype(np.float32)
    broken = with_record(dataset, 2, annotations=annotations(boxes, generator.integers(0, 2, 400)))
    found = {problem.box: problem.what for problem in find_problems(broken, read_pixels=False)}
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        inside = min(x2, 40) > max(x1, 0) and min(y2, 30) > max(y1, 0)
        expected = None
        if x2 <= x1 or y2 <= y1:
            expected = "box without area"
        elif not inside:
            expected = "box outside the image"
        elif min(x1, y1) < -1 or x2 > 41 or y2 > 31:
            expected = "box passes the image's edge"
        assert found.get(number) == expected


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_beyond_the_classes_is_found(dataset, label):
    boxes = annotations([[0, 0, 9, 9]], [label])
    assert "box of an unknown class" in kinds(with_record(dataset, 0, annotations=boxes))


def test_a_box_within_a_pixel_of_the_edge_is_clipped_without_a_word(dataset):
    boxes = annotations([[-1, -0.5, 40.75, 31]])
    edge = with_record(dataset, 0, annotations=boxes)
    assert find_problems(edge, read_pixels=False) == []
    cleaned = apply_policy(edge).records[0].annotations
    assert cleaned.boxes.tolist() == [[0, 0, 40, 30]]


def test_files_are_checked(dataset, tmp_path, write_image):
    assert kinds(with_record(dataset, 0, file_name=str(tmp_path / "no.png"))) == ["missing image"]
    (tmp_path / "0.png").write_bytes(b"")
    assert kinds(dataset, read_pixels=False) == ["empty image file"]
    write_image(tmp_path / "0.png", width=41)
    (problem,) = find_problems(dataset, read_pixels=True)
    said = f"{tmp_path / '0.png'} has 41 x 30 pixels, its annotation says 40 x 30"
    assert (problem.what, problem.value) == ("wrong size", said)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    assert kinds(dataset) == ["wrong size", "unreadable image"]
    assert kinds(dataset, read_pixels=False) == []


SPOILT = {
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "a twentieth cut off": lambda whole: whole[: len(whole) * 19 // 20],
    "no image": lambda whole: b"<html>404 Not Found</html>",
    "empty": lambda whole: b"",
    "sound": lambda whole: whole,
    "sound with bytes behind": lambda whole: whole + b"written by a camera",
}


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("damage", SPOILT)
def test_images_are_found_readable_just_when_the_loader_can_read_them(
    dataset, tmp_path, write_image, damage, suffix
):
    path = tmp_path / f"x.{suffix}"
    write_image(path)
    path.write_bytes(SPOILT[damage](path.read_bytes()))
    spoilt = with_record(dataset, 1, file_name=str(path))
    if "sound" in damage:
        read_record(spoilt.records[1])
        check_readable(spoilt)
        return
    with pytest.raises(DataError, match="cannot be read"):
        read_record(spoilt.records[1])
    with pytest.raises(
        DataError, match=re.escape(f"sound cannot be read: image {path} ")
    ) as caught:
        check_readable(spoilt)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_counted_and_wrong_sizes_found(dataset, tmp_path, write_image):
    check_readable(dataset)
    write_image(tmp_path / "0.png", width=41)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"0.png is 41 x 30 pixels .* say 40 x 30.*; so 1 more \("):
        check_readable(dataset)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_color_modes_are_notes_that_stop_nothing(dataset, tmp_path, write_image, mode):
    path = tmp_path / "other.tif"
    write_image(path, mode=mode)
    (problem,) = find_problems(with_record(dataset, 0, file_name=str(path)), read_pixels=True)
    assert (problem.level, problem.what, problem.value) == ("note", "not RGB", mode)


def test_big_endian_16_bit_images_are_notes_as_others_are(dataset, tmp_path):
    pixels = np.full((30, 40), 200 * 256, ">u2").tobytes()
    Image.frombytes("I;16B", (40, 30), pixels).save(tmp_path / "big.tif")
    big = with_record(dataset, 0, file_name=str(tmp_path / "big.tif"))
    (problem,) = find_problems(big, read_pixels=True)
    assert (problem.level, problem.what, problem.value) == ("note", "not RGB", "I;16B")


def test_floating_point_images_are_errors(dataset, tmp_path):
    Image.fromarray(np.zeros((30, 40), np.float32)).save(tmp_path / "float.tif")
    broken = with_record(dataset, 0, file_name=str(tmp_path / "float.tif"))
    (problem,) = find_problems(broken, read_pixels=True)
    assert problem.level == "error"


@pytest.mark.parametrize(("orientation", "edges"), [(3, (40, 30)), (2, (40, 30)), (6, (30, 30))])
def test_images_that_exif_turns_within_their_size_are_notes(dataset, tmp_path, orientation, edges):
    image = Image.new("RGB", edges)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif)
    changes = {"file_name": str(tmp_path / "turned.jpg"), "width": edges[0], "annotations": None}
    turned = with_record(dataset, 0, **changes)
    (problem,) = [p for p in find_problems(turned, read_pixels=True) if p.level == "note"]
    assert problem.what == "turned by EXIF"
    assert problem.value == f"{edges[0]} x {edges[1]} in the file, orientation {orientation}"


@pytest.mark.parametrize("name", ["turned.jpg", "turned.tif"])
def test_exif_orientation_counts_for_the_size(dataset, tmp_path, name):
    image = Image.new("RGB", (30, 40))
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(tmp_path / name, exif=exif)
    turned = with_record(dataset, 0, file_name=str(tmp_path / name))
    (problem,) = find_problems(turned, read_pixels=True)
    assert (problem.what, problem.level) == ("turned by EXIF", "note")
    assert problem.value == "30 x 40 in the file, orientation 8"


def test_duplicate_ids_and_empty_splits_are_found(dataset):
    assert kinds(with_record(dataset, 2, image_id=0)) == ["duplicate id"]
    empty = replace(dataset, records=())
    assert kinds(empty) == ["empty split"]
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=r"empty split|no images"):
            apply_policy(empty, on_bad_record=policy)


def test_a_class_without_boxes_is_a_warning_and_crowds_do_not_count(dataset, caplog):
    more = replace(dataset, classes=("cat", "dog", "cow"))
    crowd = annotations([[0, 0, 9, 9]], [2], crowd=True)
    more = with_record(more, 0, annotations=crowd)
    (problem,) = find_problems(more, read_pixels=True)
    assert (problem.level, problem.what, problem.value) == ("warning", "class without boxes", "cow")
    with caplog.at_level(logging.WARNING):
        assert len(apply_policy(more)) == 3
    assert "class without boxes: cow" in caplog.text


def test_many_warnings_of_a_kind_are_one_line_with_their_number(dataset, caplog):
    names = [f"class {i}" for i in range(61)]
    apply_policy(replace(dataset, classes=("cat", "dog", *names, "Class 7", "CLASS 8")))
    empty, alike = sorted(caplog.messages, key=lambda line: "case or spaces alone" in line)
    assert "63 x class without boxes: class 0, class 1, class 2, class 3, class 4 and 58" in empty
    assert empty.endswith("(it can be neither learned from nor evaluated on these images)")
    assert "2 x class name: 'Class 7' (differs from 'class 7' by case or spaces alone" in alike
    assert "'CLASS 8' (differs from 'class 8'" in alike


def test_unlabeled_images_need_no_boxes(dataset):
    assert find_problems(dataset.subset([0, 1], labeled=False), read_pixels=True) == []


def test_error_policy_lists_the_first_five_and_the_count(dataset):
    boxes = annotations([[5, 5, 5, n] for n in range(7)])
    with pytest.raises(DataError) as caught:
        apply_policy(with_record(dataset, 0, annotations=boxes))
    message = str(caught.value)
    assert message.startswith("data set sound has bad records (7): ")
    assert message.count("box without area") == 5
    assert "and 2 more" in message
    assert "\n" not in message


def test_skip_policy_drops_images_and_boxes_and_counts_them(dataset, tmp_path, caplog):
    boxes = annotations([[0, 0, 9, 9], [5, 5, 5, 9], [3, 3, 90, 9], [1, 1, 2, 2]], [0, 1, 1, 1])
    broken = with_record(dataset, 0, annotations=boxes)
    broken = with_record(broken, 1, file_name=str(tmp_path / "none.png"))
    with caplog.at_level(logging.WARNING):
        cleaned = apply_policy(broken, on_bad_record="skip")
    assert [record.image_id for record in cleaned.records] == [0, 2]
    first = cleaned.records[0].annotations
    assert first.boxes.tolist() == [[0, 0, 9, 9], [3, 3, 40, 9], [1, 1, 2, 2]]
    assert first.labels.tolist() == [0, 1, 1]
    assert len(first.crowd) == len(first.difficult) == 3
    assert "skipped 1 x box without area" in caplog.text
    assert "skipped 1 x missing image" in caplog.text


def test_skip_policy_keeps_the_first_of_two_images_with_one_id(dataset):
    twice = with_record(dataset, 2, image_id=0)
    cleaned = apply_policy(twice, on_bad_record="skip")
    assert [r.file_name[-5:] for r in cleaned.records] == ["0.png", "1.png"]


def test_policy_names_are_checked(dataset):
    with pytest.raises(ValueError, match="'ignore' is not allowed"):
        apply_policy(dataset, on_bad_record="ignore")


def test_the_two_boxes_without_area_of_bccd_are_named(real_data):
    dataset, problems = read_dataset("bccd_trainval", root=real_data)
    assert problems == []
    found = find_problems(dataset, read_pixels=False)
    assert {p.what for p in found} == {"box without area"}
    assert [(p.place, p.value) for p in found] == [
        ("object 13 of image BloodImage_00338", "xmin, ymin, xmax, ymax = 504, 337, 504, 337"),
        ("object 4 of image BloodImage_00343", "xmin, ymin, xmax, ymax = 181, 329, 181, 329"),
    ]
    assert found[0].file == str(real_data / "bccd/Annotations/BloodImage_00338.xml")
    before = sum(len(record.annotations) for record in dataset.records)
    cleaned = apply_policy(dataset, on_bad_record="skip")
    assert sum(len(record.annotations) for record in cleaned.records) == before - 2


@pytest.mark.slow
def test_every_image_of_the_real_sets_is_sound(real_data):
    for name in ("bccd_test", "voc2007_mini_trainval", "voc2007_mini_test"):
        dataset, problems = read_dataset(name, root=real_data)
        assert [*problems, *find_problems(dataset, read_pixels=True)] == []


def with_boxes_of(boxes, *, classes=("cat", "dog"), size=(100, 80)):
    """A data set of one image for each box."""
    records = tuple(
        ImageRecord(
            f"{i}.png",
            i,
            *size,
            Annotations(
                np.array([box], np.float32),
                np.zeros(1, np.int64),
                np.zeros(1, bool),
                np.zeros(1, bool),
            ),
        )
        for i, box in enumerate(boxes)
    )
    return DetectionDataset("made", records, classes)


def kinds_of(dataset):
    return [p.what for p in find_problems(dataset, read_pixels=False) if p.what != "missing image"]


def test_boxes_of_fractions_and_corners_read_as_sizes_are_noticed():
    fractions = with_boxes_of([(0.1, 0.2, 0.5, 0.9), (0, 0, 1, 1)])
    assert "boxes look like fractions" in kinds_of(fractions)
    corners = [(10, 10, 60, 70), (50, 20, 90, 60), (5, 5, 20, 30)]
    read = with_boxes_of([(x, y, x + x2, y + y2) for x, y, x2, y2 in corners])
    assert "boxes look like x1 y1 x2 y2" in kinds_of(read)
    for kind in kinds_of(with_boxes_of(corners)):
        assert "look like" not in kind


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "cat"), "names must be unique"),
        (("cat", ""), "a text that is not empty"),
        (("cat", None), "a text that is not empty"),
        (("cat", "Cat"), "case or spaces alone"),
    ],
)
def test_names_of_classes_are_checked(classes, message):
    dataset = with_boxes_of([(1, 1, 5, 5)], classes=classes)
    rules = [p.rule for p in find_problems(dataset, read_pixels=False) if p.what == "class name"]
    assert [message in rule for rule in rules] == [True]


def test_one_file_under_two_ids_is_a_note():
    dataset = with_boxes_of([(1, 1, 5, 5)] * 2)
    records = tuple(replace(record, file_name="same.png") for record in dataset.records)
    (problem,) = (
        p
        for p in find_problems(replace(dataset, records=records), read_pixels=False)
        if p.what == "duplicate file"
    )
    assert (problem.level, problem.value) == ("note", "same.png, also that of image 0")
