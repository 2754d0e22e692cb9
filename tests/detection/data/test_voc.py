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
    with pytest.raises(DataError, match=r"a\.xml: image a: unknown class: 'cow' \(one of cat\)"):
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
