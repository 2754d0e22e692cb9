import time

import numpy as np
import pytest

from ssod_imwa.detection.data.voc import VOC_CLASSES, discover_classes, load_voc
from ssod_imwa.errors import DataError


def test_pixels_counted_from_one_become_edges(tiny_voc):
    root = tiny_voc({"a": [("cat", 1, (1, 2, 40, 30)), ("cat", 0, (5, 6, 7, 8))]}, train=["a"])
    (record,) = load_voc(root, "train", name="tiny").records
    np.testing.assert_array_equal(record.annotations.boxes, [[0, 1, 40, 30], [4, 5, 7, 8]])
    assert record.annotations.difficult.tolist() == [True, False]
    assert not record.annotations.crowd.any()
    assert (record.image_id, record.width, record.height) == ("a", 40, 30)


def test_a_box_with_equal_corners_stays_without_area(tiny_voc):
    root = tiny_voc({"a": [("cat", 0, (9, 8, 9, 8))]}, train=["a"])
    (record,) = load_voc(root, "train", name="tiny").records
    assert record.annotations.boxes.tolist() == [[9, 8, 9, 8]]


def test_order_is_that_of_the_list_and_flags_of_one_class_are_no_names(tiny_voc):
    objects = [("cat", 0, (1, 1, 5, 5))]
    root = tiny_voc({"b 1": objects, "a": objects}, train=["b 1  -1", "a"])
    assert [r.image_id for r in load_voc(root, "train", name="tiny").records] == ["b 1", "a"]


def test_classes_come_from_all_splits_so_that_they_agree(tiny_voc):
    root = tiny_voc(
        {"a": [("dog", 0, (1, 1, 5, 5))], "b": [("ant", 0, (1, 1, 5, 5))]}, train=["a"], test=["b"]
    )
    train = load_voc(root, "train", name="train")
    test = load_voc(root, "test", name="test")
    assert train.classes == test.classes == ("ant", "dog")
    assert train.records[0].annotations.labels.tolist() == [1]


def test_unlabeled_images_need_no_xml(tiny_voc):
    root = tiny_voc({"a": []}, train=["a"])
    (root / "Annotations" / "a.xml").unlink()
    (record,) = load_voc(root, "train", name="tiny", labeled=False).records
    assert (record.width, record.height, record.annotations) == (40, 30, None)


def test_size_comes_from_the_image_when_the_xml_has_none(tiny_voc):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    file = root / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<width>40</width>", "<width>0</width>"))
    (record,) = load_voc(root, "train", name="tiny").records
    assert (record.width, record.height) == (40, 30)


def test_an_xml_of_another_tool_is_no_image_without_objects(tiny_voc):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    file = root / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("annotation>", "annotations>"))
    with pytest.raises(DataError, match=r"a\.xml is no VOC file: its root is <annotations>"):
        load_voc(root, "train", name="tiny", classes=["cat"])


def test_images_other_than_jpg_are_found(tiny_voc, write_image):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    (root / "JPEGImages" / "a.jpg").unlink()
    write_image(root / "JPEGImages" / "a.png")
    assert load_voc(root, "train", name="tiny").records[0].file_name.endswith("a.png")


def test_what_cannot_be_represented_is_collected_or_raised(tiny_voc):
    boxes = [("cow", 0, (1, 1, 5, 5)), ("cat", 0, (1, "x", 5, 5)), ("cat", 0, (1, 1, 5, 5))]
    root = tiny_voc({"a": boxes, "b": []}, train=["a", "b"])
    (root / "Annotations" / "b.xml").write_text("<annotation>")
    problems = []
    dataset = load_voc(root, "train", name="tiny", classes=["cat"], problems=problems)
    assert [record.image_id for record in dataset.records] == ["a"]
    assert [problem.what for problem in problems] == [
        "unknown class",
        "object without a box of four numbers",
        "no annotation",
    ]
    with pytest.raises(
        DataError, match=r"a\.xml: object 1 of image a: unknown class: 'cow' \(one of cat\)"
    ):
        load_voc(root, "train", name="tiny", classes=["cat"])


def test_a_missing_list_names_those_that_exist(tiny_voc):
    root = tiny_voc({"a": []}, train=["a"])
    with pytest.raises(DataError, match=r"val.txt does not exist \(there are: \['train'\]\)"):
        load_voc(root, "val", name="tiny")


def test_no_objects_anywhere_is_an_error(tiny_voc):
    root = tiny_voc({"a": []}, train=["a"])
    with pytest.raises(DataError, match="no annotation file with an object"):
        discover_classes(root / "Annotations")


def test_voc_classes_are_the_twenty_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_bccd_has_the_published_numbers_of_boxes(real_data):
    counts = {"train": (205, 2805), "val": (87, 1138), "test": (72, 945)}
    for split, expected in counts.items():
        dataset = load_voc(real_data / "bccd", split, name=split)
        assert dataset.classes == ("Platelets", "RBC", "WBC")
        assert (len(dataset), sum(len(r.annotations) for r in dataset.records)) == expected


def test_voc2007_mini_has_the_published_numbers_of_boxes(real_data):
    root = real_data / "voc2007_mini" / "VOC2007"
    dataset = load_voc(root, "trainval", name="mini", classes=VOC_CLASSES)
    labels = np.concatenate([record.annotations.labels for record in dataset.records])
    counts = dict(zip(VOC_CLASSES, np.bincount(labels).tolist(), strict=True))
    assert (len(dataset), len(labels)) == (520, 1426)
    assert (counts["person"], counts["bus"], counts["cow"]) == (460, 11, 26)
    # Discovered classes are the same, as detectron2's order is alphabetical.
    assert discover_classes(root / "Annotations") == VOC_CLASSES


@pytest.mark.parametrize(
    ("text", "difficult"),
    [("1", True), ("True", True), ("1.0", True), (" true ", True), ("0", False), ("False", False)],
)
def test_difficult_is_read_in_every_spelling(tiny_voc, text, difficult):
    root = tiny_voc({"a": [("cat", text, (1, 1, 5, 5))]}, train=["a"])
    (record,) = load_voc(root, "train", name="tiny").records
    assert record.annotations.difficult.tolist() == [difficult]


@pytest.mark.parametrize("text", ["", "yes", "2"])
def test_another_difficult_is_refused_with_file_and_object(tiny_voc, text):
    root = tiny_voc({"a": [("cat", text, (1, 1, 5, 5))]}, train=["a"])
    with pytest.raises(DataError, match=r"a\.xml: object 1 of image a: difficult: cat"):
        load_voc(root, "train", name="tiny")


def test_an_image_named_like_a_flagged_one_is_itself(tiny_voc):
    root = tiny_voc(
        {"cell": [("a", 0, (1, 1, 5, 5))], "cell 1": [("b", 0, (1, 1, 5, 5))]}, train=["cell 1"]
    )
    (record,) = load_voc(root, "train", name="tiny", classes=["a", "b"]).records
    assert (record.image_id, record.annotations.labels.tolist()) == ("cell 1", [1])


def test_two_image_files_of_one_name_are_a_problem(tiny_voc, write_image):
    root = tiny_voc({"a": []}, train=["a"])
    write_image(root / "JPEGImages" / "a.png")
    with pytest.raises(DataError, match=r"image a: several files: a\.jpg, a\.png"):
        load_voc(root, "train", name="tiny", classes=["cat"])


def test_a_damaged_file_of_another_split_does_not_stop_the_search_for_classes(tiny_voc):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))], "b": []}, train=["a"], test=["b"])
    (root / "Annotations" / "b.xml").write_text("<annotation>")
    (root / "Annotations" / "._a.xml").write_bytes(b"\x00\x05")
    (root / "Annotations" / "project.xml").write_text("<project><object/></project>")
    problems = []
    dataset = load_voc(root, "train", name="tiny", problems=problems)
    assert dataset.classes == ("cat",)
    assert [(problem.what, problem.level) for problem in problems] == [
        ("unreadable annotation", "warning")
    ]


def test_an_object_without_a_name_is_a_problem_with_its_place(tiny_voc):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5)), ("", 0, (1, 1, 5, 5))]}, train=["a"])
    with pytest.raises(DataError, match=r"a\.xml: object 2 of image a: object without a class"):
        load_voc(root, "train", name="tiny")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("box", [("nan", 1, 5, 5), (1, "inf", 5, 5), (1, 1, "1e300", 5)])
def test_a_box_that_is_not_finite_is_refused(tiny_voc, box):
    root = tiny_voc({"a": [("cat", 0, box)]}, train=["a"])
    with pytest.raises(DataError, match="object without a box of four numbers"):
        load_voc(root, "train", name="tiny")


@pytest.mark.parametrize("width", ["-1", "many", "1e400", "3.5"])
def test_a_size_that_is_no_number_of_pixels_is_refused(tiny_voc, width):
    root = tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<width>40<", f"<width>{width}<"))
    with pytest.raises(DataError, match=f"size {width} x 30 is not allowed"):
        load_voc(root, "train", name="tiny")


def test_a_line_of_many_blanks_is_read_at_once(tiny_voc):
    root = tiny_voc({"a": []}, train=["a" + " " * 200_000 + "b"])
    before = time.perf_counter()
    with pytest.raises(DataError, match="no annotation"):
        load_voc(root, "train", name="tiny", classes=["cat"])
    assert time.perf_counter() - before < 5  # it was a minute
