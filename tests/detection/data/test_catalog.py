import json
import re
from pathlib import Path

import numpy as np
import pytest

from ssod_imwa.data.roots import data_root
from ssod_imwa.detection.data import catalog
from ssod_imwa.detection.data.catalog import (
    available,
    content_fingerprint,
    find_source,
    fingerprint,
    load_dataset,
    load_datasets,
    register,
)
from ssod_imwa.detection.data.coco import load_coco
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(catalog, "_REGISTERED", {})


def test_root_is_the_argument_then_the_variable_then_datasets(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "from_variable")
    assert str(data_root("from_argument")) == "from_argument"
    assert str(data_root("")) == str(data_root(None)) == "from_variable"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert str(data_root(None)) == "datasets"


def test_places_are_detectron2s():
    train = find_source("coco_2017_train")
    assert (train.path, train.part) == (
        "coco/annotations/instances_train2017.json",
        "coco/train2017",
    )
    unlabeled = find_source("coco_2017_unlabeled")
    assert unlabeled.path == "coco/annotations/image_info_unlabeled2017.json"
    voc = find_source("voc_2012_trainval")
    assert (voc.kind, voc.path, voc.part, len(voc.classes)) == ("voc", "VOC2012", "trainval", 20)


def test_coco_by_place(tiny_coco, tmp_path):
    dataset = load_dataset("coco:tiny.json:images", root=tmp_path)
    assert (len(dataset), dataset.classes) == (3, ("cat", "dog"))
    assert dataset.name == "coco:tiny.json:images"


def test_coco_by_absolute_place(tiny_coco):
    file, folder, _ = tiny_coco
    assert len(load_dataset(f"coco:{file}:{folder}", root="elsewhere")) == 3


def test_voc_by_place_and_without_labels(tiny_voc, tmp_path):
    tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    assert load_dataset("voc:voc:train", root=tmp_path).classes == ("cat",)
    dataset = load_dataset("voc:voc:train", root=tmp_path, labeled=False)
    assert dataset.records[0].annotations is None


def test_folder_by_place_only_without_labels(tmp_path, write_image):
    write_image(tmp_path / "photos" / "a.png")
    assert len(load_dataset("folder:photos", root=tmp_path, labeled=False)) == 1
    with pytest.raises(DataError, match=r"has no labels.*TRAIN_UNLABELED"):
        load_dataset("folder:photos", root=tmp_path)


@pytest.mark.parametrize("name", ["coco:a.json", "coco:a:b:c", "voc::train", "folder:"])
def test_wrong_places_are_answered_with_the_right_form(name):
    with pytest.raises(DataError, match=r"is not allowed \(write (coco|voc|folder):"):
        find_source(name)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match=r"'coco_2017_trian' is not known \(nearest: coco_2017_tr"):
        load_dataset("coco_2017_trian")
    with pytest.raises(DataError, match=re.escape(", ".join(available()))):
        load_dataset("zzzzzz")


@pytest.mark.parametrize("name", [n for n in available() if not n.startswith("digits")])
def test_missing_files_are_answered_with_place_layout_and_setting(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset(name, root=tmp_path)
    message = str(caught.value)
    for part in (name, str(tmp_path), find_source(name).path, "$DETECTRON2_DATASETS"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["digits_test", "bccd_test", "coco:a.json:images"])
@pytest.mark.parametrize("by_variable", [False, True])
def test_a_named_root_that_is_not_there_is_an_error_and_is_not_made(
    name, by_variable, tmp_path, monkeypatch
):
    root = tmp_path / "datsets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root) if by_variable else "elsewhere")
    with pytest.raises(DataError) as caught:
        load_dataset(name, root="" if by_variable else root)
    assert str(root) in str(caught.value)
    assert ("$DETECTRON2_DATASETS" if by_variable else "DATASETS.ROOT") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not root.exists()


def test_digits_are_made_in_a_root_that_is_there_and_in_the_default_one(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(catalog, "ensure_digits", made.append)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, None, ""):
        with pytest.raises(DataError, match=r"no digits/annotations/test\.json"):
            load_dataset("digits_test", root=root)
    assert made == [tmp_path, Path("datasets"), Path("datasets")]


def test_bad_records_follow_the_policy(tiny_coco, tmp_path):
    file, _, content = tiny_coco
    content["annotations"][0]["bbox"] = [1, 1, 0, 5]
    content["annotations"][1]["category_id"] = 55
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bad records \(2\).*category id: 55.*without area"):
        load_dataset("coco:tiny.json:images", root=tmp_path)
    dataset = load_dataset("coco:tiny.json:images", root=tmp_path, on_bad_record="skip")
    assert [len(record.annotations) for record in dataset.records] == [1, 0, 1]


def test_the_first_of_two_images_with_one_id_keeps_its_boxes(tiny_coco, tmp_path):
    file, _, content = tiny_coco
    content["images"].append({**content["images"][0], "file_name": "5.png"})
    file.write_text(json.dumps(content))
    dataset = load_dataset("coco:tiny.json:images", root=tmp_path, on_bad_record="skip")
    found = {record.file_name[-5:]: len(record.annotations) for record in dataset.records}
    assert found == {"2.png": 2, "5.png": 0, "9.png": 2}


def test_a_registered_set_is_loaded_by_its_name(own_registry, tiny_coco, tmp_path):
    register("mine", lambda root: load_coco(root / "tiny.json", root / "images", name="mine"))
    assert "mine" in available()
    assert len(load_dataset("mine", root=tmp_path)) == 3
    unlabeled = load_dataset("mine", root=tmp_path, labeled=False)
    assert [record.annotations for record in unlabeled.records] == [None] * 3
    for name in ("mine", "digits_train", "a:b"):
        with pytest.raises(ValueError, match="is not allowed"):
            register(name, lambda root: None)


def test_unlabeled_sets_may_have_different_classes(own_registry, tiny_coco, tmp_path):
    register("mine", lambda root: load_coco(root / "tiny.json", root / "images", name="mine"))
    names = ["mine", "coco:tiny.json:images"]
    assert len(load_datasets(names, root=tmp_path, labeled=False)) == 6


def test_several_sets_become_one_with_unique_ids(tiny_coco, tmp_path):
    names = ["coco:tiny.json:images", "coco:./tiny.json:images"]
    dataset = load_datasets(names, root=tmp_path)
    ids = [record.image_id for record in dataset.records]
    assert len(set(ids)) == len(ids) == 6
    assert dataset.name == "+".join(names)
    assert [r.image_id for r in load_datasets(names[:1], root=tmp_path).records] == [2, 5, 9]


def test_sets_with_other_classes_are_not_joined(tiny_coco, tiny_voc, tmp_path):
    tiny_voc({"a": [("cat", 0, (1, 1, 5, 5))]}, train=["a"])
    with pytest.raises(DataError, match="different classes"):
        load_datasets(["coco:tiny.json:images", "voc:voc:train"], root=tmp_path)
    with pytest.raises(DataError, match="no data set is given"):
        load_datasets([])


def test_fingerprint_depends_on_the_ids_and_their_order():
    def made_of(*ids):
        return DetectionDataset("x", tuple(ImageRecord("", i, 1, 1) for i in ids), ())

    assert fingerprint(made_of(1, 2)) == fingerprint(made_of(1, 2))
    prints = {fingerprint(made_of(*ids)) for ids in ((1, 2), (2, 1), (12,), (1, 2, 3))}
    assert len(prints) == 4
    assert fingerprint(made_of(1, 2)).startswith("2:")


def test_the_real_sets_load_by_name(real_data):
    for name, images in (("bccd_test", 72), ("voc2007_mini_test", 260)):
        assert len(load_dataset(name, root=real_data)) == images
        unlabeled = load_dataset(name, root=real_data, labeled=False)
        assert fingerprint(unlabeled) == fingerprint(load_dataset(name, root=real_data))


def test_content_fingerprint_depends_on_all_that_is_learned():
    def made(classes=("a", "b"), box=(0, 0, 4, 4), label=0, width=8, flag=False, labeled=True):
        flags = np.array([flag])
        annotations = Annotations(
            np.array([box], dtype=np.float32), np.array([label], dtype=np.int64), flags, ~flags
        )
        record = ImageRecord("1.png", 1, width, 8, annotations if labeled else None)
        return content_fingerprint(DetectionDataset("some", (record,), classes))

    assert made() == made()
    others = [
        {"classes": ("b", "a")},
        {"box": (0, 0, 4, 5)},
        {"label": 1},
        {"width": 9},
        {"flag": True},
        {"labeled": False},
    ]
    assert len({made(), *(made(**other) for other in others)}) == len(others) + 1
