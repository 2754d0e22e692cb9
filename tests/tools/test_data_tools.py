import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def root(tmp_path):
    """A COCO set of 20 images, `coco:set.json:images`; the second class is on one image."""
    (tmp_path / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for number in range(20):
        name = f"{number}.png"
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "images" / name)
        content["images"].append({"id": number, "file_name": name, "width": 8, "height": 8})
        category = 2 if number == 7 else 1
        entry = {"image_id": number, "category_id": category, "bbox": [1, 1, 4, 4]}
        content["annotations"].append({"id": number + 1, **entry})
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


NAME = "coco:set.json:images"


def spoil(root):
    content = json.loads((root / "set.json").read_text())
    content["annotations"][3]["bbox"] = [1, 1, 0, 4]
    content["annotations"][4]["category_id"] = 9
    (root / "set.json").write_text(json.dumps(content))
    (root / "images" / "5.png").unlink()


def test_check_of_a_sound_set_is_0_and_shows_the_classes(call, root):
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 0
    assert "20 images, 0 problems" in out
    assert "imbalance 19.0" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["cat", "19", "19", "0", "0"] in rows
    assert ["dog", "1", "1", "0", "0"] in rows


def test_check_of_a_broken_set_is_1_and_lists_everything_by_file(call, root):
    spoil(root)
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 1
    assert f"{root / 'images' / '3.png'}\n  error: image 3: box without area: [1.0, 1.0" in out
    assert f"{root / 'set.json'}\n  error: annotations[4] of image 4: unknown category id: 9" in out
    assert f"{root / 'images' / '5.png'}\n  error: image 5: missing image" in out
    assert "3 problems" in out


def test_check_counts_grayscale_images_as_notes(call, root):
    Image.new("L", (8, 8)).save(root / "images" / "0.png")
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 0
    assert "note: 1 x not RGB (converted when read)" in out
    assert "note" not in call("check_dataset", NAME, "--root", root, "--fast")[1]


def test_check_without_labels(call, root):
    status, out, _ = call("check_dataset", "folder:images", "--root", root, "--unlabeled")
    assert (status, "no labels" in out) == (0, True)


def test_users_mistakes_are_status_2(call, root, tmp_path):
    status, _, err = call("check_dataset", "bcd_train", "--root", root)
    assert status == 2
    assert err.startswith("error: data set 'bcd_train' is not known (nearest: bccd_train")
    status, _, err = call("prepare_splits", NAME, "--root", root)
    assert status == 2
    assert "--percent and --output are needed" in err
    arguments = ("--percent", 1, "--output", tmp_path / "out.json")
    status, _, err = call("prepare_splits", NAME, "--root", root, *arguments)
    assert (status, "labels no image; at least 5 is needed" in err) == (2, True)


def test_an_index_file_is_written_and_checked(call, root, tmp_path):
    path = tmp_path / "out" / "split.json"
    status, out, _ = call(
        *("prepare_splits", NAME, "--root", root, "--percent", 10, 50, "--folds", 1, 2),
        *("--output", path),
    )
    assert status == 0
    assert f"DATASETS.SPLIT.FILE {path}" in out
    assert "warning: no labeled box of dog" in out
    status, out, _ = call("prepare_splits", NAME, "--root", root, "--check", path)
    assert (status, f"{path} fits {NAME}" in out) == (0, True)
    content = json.loads(path.read_text())
    content["10.0"]["1"] = [0, 0]
    path.write_text(json.dumps(content))
    status, _, err = call("prepare_splits", NAME, "--root", root, "--check", path)
    assert (status, "is damaged" in err) == (2, True)


def test_a_split_file_is_never_replaced_by_another(call, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write = ("prepare_splits", NAME, "--root", root, "--output", "split.json", "--percent")
    status, out, _ = call(*write, 10)
    assert (status, f"DATASETS.SPLIT.FILE {tmp_path / 'split.json'}" in out) == (0, True)
    assert call(*write, 10)[0] == 0  # the same content
    before = (tmp_path / "split.json").read_text()
    status, _, err = call(*write, 50)
    assert (status, "split.json is there already" in err) == (2, True)
    assert (tmp_path / "split.json").read_text() == before


def test_coco_pairs_are_written_and_can_be_loaded(call, root, tmp_path):
    status, out, _ = call(
        *("prepare_splits", NAME, "--root", root, "--percent", 10, "--format", "coco"),
        *("--output", tmp_path / "out"),
    )
    assert status == 0
    labeled, unlabeled = (word for word in out.split() if word.startswith("coco:"))
    assert "2 images" in call("check_dataset", labeled, "--root", root)[1]
    status, out, _ = call("check_dataset", unlabeled, "--root", root, "--unlabeled")
    assert (status, "18 images" in out) == (0, True)
    file = labeled.split(":")[1]
    assert call("prepare_splits", NAME, "--root", root, "--check", file)[0] == 0


def test_digits_are_made_where_they_are_found(call, tmp_path):
    sizes = ("--train-scenes", 12, "--test-scenes", 10)
    tmp_path = tmp_path / "new"  # the one tool that may make the folder it is given
    status, _, err = call("check_dataset", "digits_test", "--root", tmp_path)
    assert (status, f"{tmp_path}, does not exist" in err) == (2, True)
    status, out, _ = call("prepare_digits", "--root", tmp_path, *sizes)
    assert status == 0
    assert "12 training and 10 test scenes, seed 1" in out
    status, out, _ = call("check_dataset", "digits_test", "--root", tmp_path)
    assert "digits_test: 10 images, 0 problems" in out
    status, _, err = call("prepare_digits", "--root", tmp_path)
    assert (status, "exists already" in err) == (2, True)


@pytest.mark.parametrize("tool", ["check_dataset", "prepare_splits", "prepare_digits"])
def test_help_shows_examples(call, tool):
    status, out, _ = call(tool, "--help")
    assert status == 0
    assert "Examples:" in out
    assert f"  {tool}.py" in out
