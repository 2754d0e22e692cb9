import json

import pytest
import torch
from PIL import Image

from ssod_imwa.classification.data import lists as image_lists
from ssod_imwa.classification.data.catalog import load_unlabeled
from ssod_imwa.classification.data.lists import load_list_file
from ssod_imwa.classification.data.tiny_imagenet import load_tiny_imagenet
from ssod_imwa.errors import DataError


@pytest.fixture
def write_list(tmp_path):
    def write(text, name="list.txt"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_list_file_is_read_in_its_order(write_list, tmp_path):
    file = write_list("train/b/1.jpg 1\ntrain/a/my cat.jpg 0\n\ntrain/b/2.jpg 1\n")
    dataset = load_list_file(file, tmp_path, name="x")
    assert dataset.labels.tolist() == [1, 0, 1]
    assert dataset.classes == ("0", "1")
    assert dataset.files[1] == str(tmp_path / "train/a/my cat.jpg")
    assert load_list_file(file, tmp_path, name="x", classes=("a", "b")).classes == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\n", r"list.txt:2: 'b.jpg' is not allowed \(write \"PATH LABEL\"\)"),
        ("a.jpg 0\nb.jpg -1\n", "list.txt:2"),
        ("a.jpg zero\n", "list.txt:1"),
        ("7\n", "list.txt:1"),
        ("\n", "is empty"),
        ("a.jpg 0\nb.jpg 2\nc.jpg 2\n", r"x: 1 of 3 classes have no images: 1 \(1\)"),
        ("a.jpg 0\nb.jpg 999999999999\n", "label 999999999999 is not allowed with 2 images"),
    ],
)
def test_bad_lists_are_refused(write_list, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_list_file(write_list(text), tmp_path, name="x")


def test_labels_beyond_the_given_classes_are_refused(write_list, tmp_path):
    with pytest.raises(DataError, match=r"labels are 0..1, with 1 classes"):
        load_list_file(write_list("a.jpg 0\nb.jpg 1\n"), tmp_path, name="x", classes=("a",))


def test_missing_lists_and_folders_are_named(write_list, tmp_path):
    with pytest.raises(DataError, match=r"list of images .*none.txt does not exist"):
        load_list_file(tmp_path / "none.txt", tmp_path, name="x")
    with pytest.raises(DataError, match=r"image folder .*none does not exist"):
        load_list_file(write_list("a.jpg 0\n"), tmp_path / "none", name="x")


def test_a_published_list_has_to_be_whole(write_list, tmp_path, monkeypatch):
    file = write_list("a.jpg 0\nb.jpg 1\n", "Places_LT_train.txt")
    message = r"has 2 images of 2 classes, the published list has 62500 of 365"
    with pytest.raises(DataError, match=message):
        load_list_file(file, tmp_path, name="x")
    monkeypatch.setitem(image_lists.PUBLISHED_LISTS, "Places_LT_train", (2, 2))
    assert len(load_list_file(file, tmp_path, name="x")) == 2


def test_json_lists_of_both_forms_are_read(tmp_path):
    inaturalist = {
        "images": [{"id": 7, "file_name": "b/1.jpg"}, {"id": 3, "file_name": "a/2.jpg"}],
        "annotations": [{"image_id": 3, "category_id": 0}, {"image_id": 7, "category_id": 1}],
    }
    bbn = {
        "annotations": [
            {"image_id": 0, "fpath": "a/2.jpg", "category_id": 0},
            {"image_id": 1, "fpath": "b/1.jpg", "category_id": 1},
        ],
        "num_classes": 2,
    }
    for content in (inaturalist, bbn):
        file = tmp_path / "list.json"
        file.write_text(json.dumps(content))
        dataset = load_list_file(file, tmp_path, name="x")
        assert dataset.labels.tolist() == [0, 1]
        assert dataset.files == (str(tmp_path / "a/2.jpg"), str(tmp_path / "b/1.jpg"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "list.json is no JSON file: Expecting property name"),
        ("{}", "no 'annotations'"),
        ('{"annotations": [{"category_id": 0, "image_id": 5}]}', "no 5"),
        ('{"annotations": [{"fpath": "a", "category_id": "cat"}]}', "category_id = 'cat'"),
        ('{"annotations": []}', "is empty"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], '
            '"annotations": [{"category_id": 0, "image_id": 1}]}',
            "two images have the id 1",
        ),
    ],
)
def test_bad_json_lists_are_refused(tmp_path, text, message):
    file = tmp_path / "list.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_list_file(file, tmp_path, name="x")
    assert "\n" not in str(caught.value)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Two classes of one training image; two validation images, the second class first."""
    folder = tmp_path / "tiny-imagenet-200"
    for number, class_name in enumerate(("n02", "n01")):
        (folder / "train" / class_name / "images").mkdir(parents=True)
        path = folder / "train" / class_name / "images" / f"{class_name}_0.JPEG"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (folder / "val" / "images").mkdir(parents=True)
    for number in range(2):
        image = Image.new("RGB", (8, 8), (100 * number, 0, 0))
        image.save(folder / "val" / "images" / f"val_{number}.JPEG")
    lines = "val_0.JPEG\tn02\t0\t0\t62\t57\nval_1.JPEG\tn01\t3\t0\t63\t63\n"
    (folder / "val" / "val_annotations.txt").write_text(lines)
    return tmp_path


def test_tiny_imagenet_has_the_same_classes_in_both_parts(tiny_imagenet):
    train, val = (load_tiny_imagenet(tiny_imagenet, split) for split in ("train", "val"))
    assert train.classes == val.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 1]
    assert val.labels.tolist() == [1, 0]
    assert val.images.dtype == torch.uint8
    assert val.images[1, 0].float().mean() == pytest.approx(100, abs=3)


def test_an_unknown_class_of_tiny_imagenet_is_named(tiny_imagenet):
    file = tiny_imagenet / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    file.write_text("val_0.JPEG\tn09\t0\t0\t62\t57\n")
    with pytest.raises(DataError, match=r"val_annotations.txt:1: .*n09"):
        load_tiny_imagenet(tiny_imagenet, "val")


def test_blanks_before_a_label_and_a_byte_order_mark_are_no_part_of_a_path(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa b.jpg  0\nc.jpg\t1\n".encode())
    dataset = load_list_file(tmp_path / "list.txt", tmp_path, name="x")
    assert dataset.files == (str(tmp_path / "a b.jpg"), str(tmp_path / "c.jpg"))


def test_a_list_in_latin_1_is_refused_with_its_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a.jpg 0\nvögel.jpg 1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"list.txt:2: is not UTF-8 text \(byte 0xf6"):
        load_list_file(tmp_path / "list.txt", tmp_path, name="x")


def test_a_list_for_testing_may_lack_a_class(write_list, tmp_path, caplog):
    file = write_list("a.jpg 0\nb.jpg 2\n")
    classes = ("cat", "dog", "cow")
    dataset = load_list_file(file, tmp_path, name="x", classes=classes, complete=False)
    assert dataset.counts == [1, 0, 1]
    assert "1 of 3 classes have no images: 1 (dog)" in caplog.text


@pytest.mark.parametrize(
    ("text", "classes", "labels"),
    [
        ("a.jpg 0\nb.jpg 2\n", "0123", [0, 2]),  # classes without an image
        ("a.jpg 0\nb.jpg 2\n", "abcd", [-1, -1]),  # numbers say nothing of these classes
        ("a.jpg 0\nb.jpg 9\n", "0123", [-1, -1]),
    ],
)
def test_an_unlabeled_list_may_lack_classes(write_list, tmp_path, text, classes, labels):
    write_list(text)
    settings = {"root": tmp_path, "classes": tuple(classes)}
    dataset = load_unlabeled("list:list.txt:.", **settings)
    assert (dataset.labels.tolist(), dataset.classes) == (labels, tuple(classes))
    assert dataset.files == (str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"))
    assert not dataset.is_labeled
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg")
    in_memory = load_unlabeled("list:list.txt:.", **settings, in_memory=True)
    assert in_memory.images.shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"fpath": None, "category_id": 0}, "path None"),
        ({"fpath": "a", "category_id": True}, "category_id = True"),
        ({"image_id": [1], "category_id": 0}, "unhashable"),
        (7, "not subscriptable"),
    ],
)
def test_values_of_wrong_types_are_refused(tmp_path, entry, message):
    (tmp_path / "list.json").write_text(json.dumps({"annotations": [entry]}))
    with pytest.raises(DataError, match=message):
        load_list_file(tmp_path / "list.json", tmp_path, name="x")
