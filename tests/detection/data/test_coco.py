import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.coco import load_coco, read_coco_file, to_coco
from ssod_imwa.errors import DataError


def rewrite(file, content, **changes):
    file.write_text(json.dumps({**content, **changes}))


def test_images_are_sorted_by_id_and_categories_become_0_to_c(tiny_coco):
    file, folder, _ = tiny_coco
    dataset = load_coco(file, folder, name="tiny")
    assert [record.image_id for record in dataset.records] == [2, 5, 9]
    assert dataset.classes == ("cat", "dog")
    assert dataset.records[0].file_name == str(folder / "2.png")
    assert (dataset.records[0].width, dataset.records[0].height) == (40, 30)
    first, empty, last = (record.annotations for record in dataset.records)
    np.testing.assert_array_equal(first.boxes, [[0.5, 0, 10.5, 20.25], [2, 2, 4, 4]])
    assert first.labels.tolist() == [0, 1]
    assert first.difficult.tolist() == [False, True]
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert last.labels.tolist() == [1, 0]
    assert last.crowd.tolist() == [False, True]


def test_arrays_have_the_documented_types(tiny_coco):
    file, folder, _ = tiny_coco
    for record in load_coco(file, folder, name="tiny").records:
        a = record.annotations
        types = [x.dtype for x in (a.boxes, a.labels, a.crowd, a.difficult)]
        assert types == [np.float32, np.int64, np.bool_, np.bool_]


def test_boxes_agree_with_pycocotools(tiny_coco):
    file, folder, _ = tiny_coco
    reference = COCO(str(file))
    for record in load_coco(file, folder, name="tiny").records:
        expected = reference.imgToAnns[record.image_id]
        boxes = record.annotations.boxes.copy()
        boxes[:, 2:] -= boxes[:, :2]
        assert boxes.tolist() == [entry["bbox"] for entry in expected]


def test_segmentations_are_not_read_for_training_but_kept_for_rewriting(tiny_coco):
    file, _, content = tiny_coco
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    file.write_text(json.dumps(content))
    assert read_coco_file(file)["annotations"] == content["annotations"]
    read = read_coco_file(file, segmentations=False)
    assert not any("segmentation" in entry for entry in read["annotations"])


def test_a_list_of_images_alone_can_only_be_read_unlabeled(tiny_coco):
    file, folder, content = tiny_coco
    file.write_text(json.dumps({"images": content["images"]}))
    dataset = load_coco(file, folder, name="tiny", labeled=False)
    assert [record.annotations for record in dataset.records] == [None] * 3
    assert dataset.classes == ()
    with pytest.raises(DataError, match=r"no list annotations and categories.*unlabeled"):
        load_coco(file, folder, name="tiny")


def test_what_to_coco_writes_reads_back_the_same(tiny_coco, tmp_path):
    file, folder, _ = tiny_coco
    dataset = load_coco(file, folder, name="tiny")
    again_file = tmp_path / "again.json"
    again_file.write_text(json.dumps(to_coco(dataset)))
    again = load_coco(again_file, "", name="tiny")
    assert again.classes == dataset.classes
    for old, new in zip(dataset.records, again.records, strict=True):
        assert (old.image_id, old.width) == (new.image_id, new.width)
        for field in ("boxes", "labels", "crowd", "difficult"):
            np.testing.assert_array_equal(
                getattr(old.annotations, field), getattr(new.annotations, field)
            )


def test_to_coco_gives_area_flags_and_one_based_categories(tiny_coco):
    file, folder, _ = tiny_coco
    content = to_coco(load_coco(file, folder, name="tiny"))
    assert [category["id"] for category in content["categories"]] == [1, 2]
    entry = content["annotations"][0]
    assert entry["bbox"] == [0.5, 0, 10, 20.25]
    assert entry["area"] == 202.5
    assert [e["ignore"] for e in content["annotations"]] == [0, 1, 0, 0]
    assert [e["iscrowd"] for e in content["annotations"]] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, r"annotations\[0\] of image 77: annotation of an unknown image: 77"),
        ({"category_id": 5}, r"annotations\[0\] of image 9: unknown category id: 5"),
        ({"bbox": [1, 2, 3]}, r"annotations\[0\] of image 9: box: \[1, 2, 3\] \(four numbers"),
        ({"bbox": [1, 2, "3", 4]}, "four numbers"),
        ({"bbox": None}, "four numbers"),
    ],
)
def test_an_annotation_that_cannot_be_represented_is_named(tiny_coco, change, message):
    file, folder, content = tiny_coco
    first, *others = content["annotations"]
    rewrite(file, content, annotations=[{**first, **change}, *others])
    with pytest.raises(DataError, match=message):
        load_coco(file, folder, name="tiny")
    problems = []
    dataset = load_coco(file, folder, name="tiny", problems=problems)
    assert len(problems) == 1
    assert problems[0].file == str(file)
    assert sum(len(record.annotations) for record in dataset.records) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "has no list images and annotations and categories"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\]: file_name: None",
        ),
        (
            '{"images": [3], "annotations": [], "categories": []}',
            r"images\[0\]: image: 3 \(an object with id",
        ),
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, text, message):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        load_coco(file, tmp_path, name="broken")


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_labeled_file_without_categories_is_refused(tiny_coco, policy):
    file, folder, content = tiny_coco
    rewrite(file, content, categories=[], annotations=[])
    name = f"coco:{file}:{folder}"
    with pytest.raises(DataError, match=r"tiny.json: no class: 0 classes \(a labeled data set"):
        load_dataset(name, on_bad_record=policy)
    assert len(load_dataset(name, labeled=False)) == 3


def test_half_a_character_is_neither_a_name_nor_an_id(tiny_coco):
    file, folder, content = tiny_coco
    first, *others = content["categories"]
    rewrite(file, content, categories=[{**first, "name": "\ud800"}, *others])
    with pytest.raises(DataError, match=r"categories\[0\]: class name: '\\ud800'"):
        load_coco(file, folder, name="tiny")
    image, *others = content["images"]
    rewrite(file, content, images=[{**image, "id": "\ud800"}, *others])
    with pytest.raises(DataError, match=r"images\[0\]: image id: '\\ud800'"):
        load_coco(file, folder, name="tiny")


def test_a_missing_file_and_mixed_ids_are_refused(tiny_coco, tmp_path):
    file, folder, content = tiny_coco
    with pytest.raises(DataError, match="does not exist"):
        load_coco(tmp_path / "none.json", folder, name="none")
    rewrite(file, content, images=[*content["images"], {**content["images"][0], "id": "a"}])
    with pytest.raises(DataError, match="different types"):
        load_coco(file, folder, name="tiny")
    twice = [*content["categories"], {"id": 3, "name": "cow"}]
    rewrite(file, content, categories=twice)
    with pytest.raises(DataError, match=r"categories\[2\]: category id: 3 \(must be unique"):
        load_coco(file, folder, name="tiny")


@pytest.mark.parametrize("value", [1, True, "1", "true", 1.0])
def test_flags_are_read_in_every_spelling(tiny_coco, value):
    file, folder, content = tiny_coco
    first, *others = content["annotations"]
    rewrite(file, content, annotations=[{**first, "iscrowd": value}, *others])
    dataset = load_coco(file, folder, name="tiny")
    assert dataset.records[2].annotations.crowd.tolist() == [True, True]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("annotations", {"iscrowd": None}, r"annotations\[0\] of image 9: iscrowd: None"),
        ("annotations", {"ignore": "maybe"}, "ignore: 'maybe'"),
        ("annotations", {"image_id": [9]}, r"unknown image: \[9\]"),
        ("annotations", {"category_id": {}}, "unknown category id"),
        ("images", {"width": None}, r"images\[0\]: width: None \(a whole number of pixels"),
        ("images", {"width": "64.0"}, "width: '64.0'"),
        ("images", {"height": -1}, "height: -1"),
        ("images", {"width": 1e400}, "width: inf"),
        ("images", {"file_name": None}, r"images\[0\]: file_name: None"),
        ("images", {"id": [1]}, r"image id: \[1\]"),
        ("categories", {"name": 7}, r"categories\[0\]: class name: 7"),
        ("categories", {"name": " "}, "a text that is not empty"),
        ("categories", {"name": "cat"}, "must be unique"),
        ("categories", {"id": None}, "category id: None"),
    ],
)
def test_entries_of_wrong_types_are_named_and_left_out(tiny_coco, key, change, message):
    file, folder, content = tiny_coco
    first, *others = content[key]
    rewrite(file, content, **{key: [{**first, **change}, *others]})
    with pytest.raises(DataError, match=message) as caught:
        load_coco(file, folder, name="tiny")
    assert "\n" not in str(caught.value)
    problems = []
    load_coco(file, folder, name="tiny", problems=problems)
    assert problems[0].file == str(file)


def test_a_file_without_images_is_an_empty_data_set(tiny_coco):
    file, folder, content = tiny_coco
    rewrite(file, content, images=[], annotations=[])
    assert len(load_coco(file, folder, name="tiny")) == 0
