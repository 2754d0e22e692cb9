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
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def spoil(root):
    content = json.loads((root / "set.json").read_text())
    content["annotations"][3]["bbox"] = [1, 1, 0, 4]
    content["annotations"][4]["category_id"] = 9
    (root / "set.json").write_text(json.dumps(content))
    (root / "images" / "5.png").unlink()


def test_check_of_a_sound_set_is_0_and_shows_the_classes(call, root):
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 0
    assert "20 images, 0 errors" in out
    assert "imbalance 19.0" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["cat", "19", "19", "0", "0"] in rows
    assert ["dog", "1", "1", "0", "0"] in rows


def test_check_of_a_broken_set_is_1_and_names_what_to_edit_by_kind(call, root):
    spoil(root)
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 1
    lines = out.splitlines()
    assert lines[:6] == [
        "error: 1 x unknown category id (must be an id of the list categories)",
        f"  {root / 'set.json'}: annotations[4] of image 4: 9",
        "error: 1 x box without area (width and height must be above 0)",
        f"  {root / 'set.json'}: annotations[3] of image 3: x, y, width, height = 1, 1, 0, 4",
        "error: 1 x missing image (restore the file, or take the image out of the data set)",
        f"  {root / 'images' / '5.png'}: image 5: there is no such file",
    ]
    assert "20 images, 3 errors" in out


def test_check_shows_the_first_five_of_a_kind_unless_asked_for_all(call, root):
    content = json.loads((root / "set.json").read_text())
    for entry in content["annotations"][10:17]:
        entry["bbox"][2] = 0
    (root / "set.json").write_text(json.dumps(content))
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert (status, "error: 7 x box without area" in out) == (1, True)
    assert out.count("width, height = ") == 5
    assert "  and 2 more (--all shows them)" in out
    _, out, _ = call("check_dataset", NAME, "--root", root, "--all")
    assert (out.count("width, height = "), "more (" in out) == (7, False)


def test_warnings_and_duplicate_files_do_not_fail_the_check(call, root):
    content = json.loads((root / "set.json").read_text())
    content["categories"].append({"id": 3, "name": "owl"})
    content["images"].append({**content["images"][0], "id": 20})
    (root / "set.json").write_text(json.dumps(content))
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 0
    assert "warning: 1 x class without boxes" in out
    assert "note: 1 x duplicate file (counts twice)" in out
    assert "21 images, 0 errors, 1 warning" in out


def test_no_finding_contradicts_its_rule(call, root):
    whole = (root / "images" / "0.png").read_bytes()
    (root / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (6, 8)).save(root / "images" / "1.png")
    status, out, _ = call("check_dataset", NAME, "--root", root)
    assert status == 1
    assert "error: 1 x unreadable image (restore the file, or take the image out" in out
    size = f"{root / 'set.json'}: image 1: {root / 'images/1.png'} has 6 x 8 pixels"
    assert f"{size}, its annotation says 8 x 8" in out
    assert "it can be decoded" not in out
    assert "both are the same" not in out


def test_a_voc_box_is_shown_as_in_its_file(call, root):
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / "voc" / folder).mkdir(parents=True)
    (root / "voc/ImageSets/Main/train.txt").write_text("a\n")
    Image.new("RGB", (20, 20)).save(root / "voc/JPEGImages/a.jpg")
    boxes = [(1, 1, 20, 20), (30, 3, 40, 9)]
    objects = "".join(
        "<object><name>owl</name><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(CORNERS, box, strict=True))
        + "</bndbox></object>"
        for box in boxes
    )
    file = root / "voc/Annotations/a.xml"
    size = "<size><width>20</width><height>20</height></size>"
    file.write_text(f"<annotation>{size}{objects}</annotation>")
    status, out, _ = call("check_dataset", "voc:voc:train", "--root", root)
    assert status == 1
    box = "xmin, ymin, xmax, ymax = 30, 3, 40, 9 in 20 x 20"
    assert f"  {file}: object 2 of image a: {box}" in out


def test_classification_is_checked_alike(call, root):
    lines = ["0.png 0", "1.png 1", "0.png 0", "2.png 0", "2.png 1"]
    (root / "list.txt").write_text("\n".join(lines))
    name = ("check_dataset", "list:list.txt:images", "--classification", "--root", root)
    status, out, _ = call(*name)
    assert status == 0
    folder = root / "images"
    assert (
        f"warning: 1 x file of several classes (must be of one class)\n  {root}/list.txt: " in out
    )
    assert f"entries 4, 5: {folder}/2.png as 0 and 1" in out
    assert f"note: 1 x duplicate file (counts as often as it is listed)\n  {root}/list.txt: " in out
    (folder / "1.png").unlink()
    status, out, _ = call(*name)
    assert (status, f"  {folder}/1.png: image 1: there is no such file" in out) == (1, True)


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
    _, _, err = call("prepare_splits", NAME, "--root", root, *arguments, "--check", "some.json")
    assert "--check draws and writes nothing" in err
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
    assert "digits_test: 10 images, 0 errors" in out
    status, _, err = call("prepare_digits", "--root", tmp_path)
    assert (status, "exists already" in err) == (2, True)


@pytest.mark.parametrize("tool", ["check_dataset", "prepare_splits", "prepare_digits"])
def test_help_shows_examples(call, tool):
    status, out, _ = call(tool, "--help")
    assert status == 0
    assert "Examples:" in out
    assert f"  {tool}.py" in out


def test_unlabeled_images_of_a_classifier_are_checked_without_classes(call, tmp_path):
    (tmp_path / "photos/deep").mkdir(parents=True)
    for name in ("1", "deep/2"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"photos/{name}.png")
    command = ("check_dataset", "folder:photos", "--classification", "--unlabeled")
    status, out, _ = call(*command, "--root", tmp_path)
    assert (status, out) == (0, "folder:photos: 2 images, 0 errors\n")
    (tmp_path / "photos/broken.png").write_text("none")
    status, out, _ = call(*command, "--root", tmp_path)
    assert status == 1
    assert "1 x unreadable image" in out
