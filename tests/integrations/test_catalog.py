"""Data sets that are registered in either catalog."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.errors import DataError

MODULE = """
from detectron2.data import DatasetCatalog, MetadataCatalog

box = {{"bbox": [1, 2, 30, 40], "bbox_mode": 0, "category_id": 0}}
entry = {{"file_name": "{folder}/a.png", "image_id": 1, "annotations": [box]}}
DatasetCatalog.register("theirs", lambda: [entry])
MetadataCatalog.get("theirs").thing_classes = ["crow"]
"""

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]


@pytest.fixture
def registered(tmp_path):
    """A function that registers two images of a project in detectron2, under a new name."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    for name in ("a", "b"):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.png")
    boxes = [
        {"bbox": [5, 6, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
        {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1},
    ]
    entries = [
        {
            "file_name": str(tmp_path / "a.png"),
            "image_id": 7,
            "height": 40,
            "width": 60,
            "annotations": boxes,
        },
        {"file_name": str(tmp_path / "b.png"), "annotations": []},
    ]
    names = []

    def register(name, entries=entries, classes=("cat", "dog")):
        DatasetCatalog.register(name, lambda: entries)
        if classes:
            MetadataCatalog.get(name).thing_classes = list(classes)
        names.append(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_a_set_of_theirs_is_found_by_its_name(registered):
    registered("theirs")
    dataset = load_dataset("theirs")
    assert dataset.classes == ("cat", "dog")
    first, second = dataset.records
    assert (first.image_id, first.width, first.height) == (7, 60, 40)
    np.testing.assert_array_equal(first.annotations.boxes, [[5, 6, 25, 16], [1, 2, 30, 40]])
    np.testing.assert_array_equal(first.annotations.labels, [1, 0])
    np.testing.assert_array_equal(first.annotations.crowd, [False, True])
    assert (second.image_id, second.width, second.height) == (second.file_name, 60, 40)
    assert len(second.annotations) == 0


def test_a_run_of_ours_finds_what_an_imported_module_registers_there(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "their_data.py").write_text(MODULE.format(folder=tmp_path))
    code = (
        "import sys\n"
        "from ssod_imwa.data.registration import import_modules\n"
        "from ssod_imwa.detection.data.catalog import load_dataset\n"
        "import_modules(['their_data'])\n"
        "print(load_dataset('theirs').classes)\n"
        "assert 'ssod_imwa.integrations' not in sys.modules\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "('crow',)\n"


def test_unlabeled_images_need_neither_classes_nor_annotations(registered, tmp_path):
    registered("bare", [{"file_name": str(tmp_path / "a.png")}], classes=())
    dataset = load_dataset("bare", labeled=False)
    assert [record.annotations for record in dataset.records] == [None]
    with pytest.raises(DataError, match="has no class names"):
        load_dataset("bare")


def test_entries_that_cannot_be_used_are_named(registered, tmp_path):
    registered("nameless", [{"image_id": 3}])
    with pytest.raises(DataError, match="entry 0 of detectron2's data set 'nameless' has no file"):
        load_dataset("nameless")
    registered("unlabeled", [{"file_name": str(tmp_path / "a.png")}])
    with pytest.raises(DataError, match="has no annotations"):
        load_dataset("unlabeled")
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 1}
    changes = (
        {"bbox": None},
        {"bbox": [1]},
        {"bbox_mode": "x"},
        {"iscrowd": "perhaps"},
        {"category_id": "1"},
    )
    for number, change in enumerate(changes):
        entry = {"file_name": str(tmp_path / "a.png"), "annotations": [{**box, **change}]}
        registered(f"d2_wrong_{number}", entries=[entry])
        with pytest.raises(DataError, match=r"entry 0 of detectron2's data set .* has (an|cat)"):
            load_dataset(f"d2_wrong_{number}")
    bad = {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 2}
    registered("strange", [{"file_name": str(tmp_path / "a.png"), "annotations": [bad]}])
    with pytest.raises(DataError, match=r"has category_id 2 \(must be 0..1"):
        load_dataset("strange")


def test_ours_are_registered_there_with_one_call(tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from ssod_imwa.detection.data import catalog
    from ssod_imwa.detection.data.digits import make_digits
    from ssod_imwa.integrations.detectron2 import register_in_detectron2

    make_digits(tmp_path / "digits", train_scenes=12, test_scenes=10)
    register_in_detectron2(["digits_test"], root=tmp_path)
    dataset = catalog.load_dataset("digits_test", root=tmp_path)
    entries = DatasetCatalog.get("digits_test")
    assert MetadataCatalog.get("digits_test").thing_classes == list(dataset.classes)
    assert [entry["image_id"] for entry in entries] == [r.image_id for r in dataset.records]
    boxes = [box["bbox"] for box in entries[0]["annotations"]]
    np.testing.assert_allclose(boxes, dataset.records[0].annotations.boxes)
    with pytest.raises(DataError, match="has data sets of the names digits_test already"):
        register_in_detectron2(["digits_test"], root=tmp_path)
    DatasetCatalog.remove("digits_test")
    MetadataCatalog.pop("digits_test")
