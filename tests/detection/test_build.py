import json
import logging
import shutil

import numpy as np

from ssod_imwa.detection.build import build_data
from ssod_imwa.detection.data.catalog import load_dataset


def test_hidden_truth_is_that_of_the_unlabeled_images_by_position(detection_config, root, tmp_path):
    """Images of a set of their own come last and have none."""
    shutil.copytree(root, tmp_path / "data")
    shutil.copytree(root / "test", tmp_path / "data" / "more")
    more = ("DATASETS.TRAIN_UNLABELED", "['folder:more']")
    cfg = detection_config("DATASETS.ROOT", tmp_path / "data", *more)
    data = build_data(cfg)
    whole = load_dataset(cfg.DATASETS.TRAIN[0], root=cfg.DATASETS.ROOT)
    by_file = {record.file_name: record.annotations for record in whole.records}
    assert len(data.hidden_truth) == len(data.unlabeled) == 4 + 4
    for record, truth in zip(data.unlabeled.records, data.hidden_truth, strict=True):
        assert record.annotations is None
        if record.file_name in by_file:
            assert np.array_equal(truth.boxes, by_file[record.file_name].boxes)
        else:
            assert truth is None
    assert [truth is None for truth in data.hidden_truth] == 4 * [False] + 4 * [True]


def test_images_without_boxes_that_are_left_out_are_counted(
    detection_config, root, tmp_path, caplog
):
    shutil.copytree(root, tmp_path / "data")
    cfg = detection_config("DATASETS.ROOT", tmp_path / "data", "DATASETS.SPLIT.PERCENT", 50)
    file = tmp_path / "data" / cfg.DATASETS.TRAIN[0].split(":")[1]
    content = json.loads(file.read_text())
    first, count = content["images"][0]["id"], len(content["images"])
    others = [entry for entry in content["annotations"] if entry["image_id"] != first]
    file.write_text(json.dumps({**content, "annotations": others}))
    with caplog.at_level(logging.INFO):
        build_data(cfg)
    assert f"1 of {count} images have no box and are left out" in caplog.text
