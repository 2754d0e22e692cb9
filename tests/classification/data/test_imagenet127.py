import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssod_imwa.classification.data.catalog import load_images
from ssod_imwa.classification.data.imagenet127 import (
    BATCHES,
    class_table,
    fine_to_coarse,
    read_class_table,
)
from ssod_imwa.errors import DataError

TOOL = Path(__file__).parents[3] / "tools/prepare_imagenet127.py"
# Sizes of 127 classes with the published ends.
SIZES = [218, 124, 92, 59, 57, 47, 43, 25, 21, 17, *[5] * 24, *[4] * 28, *[1] * 65]
GENERATOR = np.random.default_rng(0)
COARSE_OF = GENERATOR.permutation(np.repeat(np.arange(127), SIZES))  # by fine class
SYNSETS = [f"n{number:08d}" for number in GENERATOR.permutation(10_000_000)[:1000]]


def write(file, lines):
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


@pytest.fixture
def lists(tmp_path):
    """The lists of a made-up ImageNet: by fine class, sorted synset, and training image."""
    rank = {synset: i for i, synset in enumerate(sorted(SYNSETS))}
    val = [(f"val_{i:04d}.JPEG", fine) for i, fine in enumerate(GENERATOR.permutation(1000))]
    contents = {
        "synsets": [f"{synset} {i + 1} a_name" for i, synset in enumerate(SYNSETS)],
        "fine": [f"{image} {rank[SYNSETS[fine]]}" for image, fine in val],
        "coarse": [f"{image} {COARSE_OF[fine]}" for image, fine in val],
        "training": [f"{s}_17.JPEG {COARSE_OF[fine]}" for fine, s in enumerate(SYNSETS)],
    }
    return {name: write(tmp_path / f"{name}.txt", lines) for name, lines in contents.items()}


@pytest.fixture
def root(tmp_path):
    """Down-sampled images: one of each fine class and some more, cut into ten files."""
    folder = tmp_path / "imagenet32"
    folder.mkdir()
    labels = np.concatenate([np.arange(1000), GENERATOR.integers(0, 1000, 200)])
    for part, files in BATCHES.items():
        for file, fine in zip(files, np.array_split(labels, len(files)), strict=True):
            pixels = GENERATOR.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [int(x) + 1 for x in fine]}
            if part == "train":
                content["mean"] = pixels.mean(0)
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


def test_both_kinds_of_lists_give_the_class_of_each_fine_class(lists):
    by_labels = fine_to_coarse(lists["coarse"], lists["fine"], lists["synsets"])
    by_names = fine_to_coarse(lists["training"], None, lists["synsets"])
    assert by_labels == by_names == {fine: str(c) for fine, c in enumerate(COARSE_OF)}


def test_the_tool_writes_a_table_by_which_images_are_read(lists, root):
    command = [sys.executable, TOOL, lists["coarse"], "--fine", lists["fine"]]
    command += ["--synsets", lists["synsets"], "--root", root]
    subprocess.run(list(map(str, command)), check=True)
    train = load_images("imagenet127_32_train", root=root)
    assert train.counts == sorted(train.counts, reverse=True)
    assert sum(train.counts) == 1200
    contents = [
        pickle.loads((root / "imagenet32" / file).read_bytes()) for file in BATCHES["train"]
    ]
    pixels = np.concatenate([content["data"] for content in contents])
    fine = [label - 1 for content in contents for label in content["labels"]]
    assert np.array_equal(train.images.numpy(), pixels.reshape(-1, 3, 32, 32))
    names = [train.classes[label] for label in train.labels]
    assert names == [str(COARSE_OF[label]) for label in fine]
    assert load_images("imagenet127_32_val", root=root).classes == train.classes


def test_classes_are_numbered_by_falling_images():
    coarse, counts = {0: "b", 1: "a", 2: "c", 3: "a"}, np.array([5, 3, 9, 2])
    assert class_table(coarse, counts) == ["2 b", "1 a", "0 c", "1 a"]  # ties by name


def test_lists_of_something_else_are_refused(lists, tmp_path):
    text = lists["coarse"].read_text().splitlines()
    short = write(tmp_path / "short.txt", text[:-1])
    with pytest.raises(DataError, match=r"of 999 fine ones, .* \(must be 127 of 1000"):
        fine_to_coarse(short, lists["fine"], lists["synsets"])
    with pytest.raises(DataError, match=r"the fine class of val_0000.JPEG is not known"):
        fine_to_coarse(lists["coarse"], None, lists["synsets"])
    twice = write(tmp_path / "twice.txt", [*text, f"{text[0].split()[0]} other"])
    with pytest.raises(DataError, match=r"fine class \d+ is of \d+ and of other"):
        fine_to_coarse(twice, lists["fine"], lists["synsets"])
    with pytest.raises(DataError, match=r"'word' is not allowed \(write IMAGE CLASS\)"):
        fine_to_coarse(write(tmp_path / "x.txt", ["word"]), lists["fine"], lists["synsets"])


def test_a_table_of_another_form_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"does not exist \(tools/prepare_imagenet127.py makes it"):
        read_class_table(tmp_path / "none")
    file = write(tmp_path / "classes.txt", ["0 dog", "0 cat"])
    with pytest.raises(DataError, match=r"classes.txt:2: '0 cat' is not allowed"):
        read_class_table(file)
    with pytest.raises(DataError, match=r"has 1 lines of 1 classes \(must be 1000 of classes 0"):
        read_class_table(write(file, ["0 dog"]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"data": np.zeros((2, 9), np.uint8), "labels": [1, 2]}, "a row of 3072"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}, "one of 1..1000"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "one of 1..1000"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}, "must be uint8"),
        ({"images": 1}, "no data and labels"),
        (open, "is not a pickle of images"),
    ],
)
def test_batches_of_another_form_are_refused(root, content, reason):
    (root / "imagenet127").mkdir()
    write(root / "imagenet127/classes.txt", [f"{c} class{c}" for c in COARSE_OF])
    (root / "imagenet32/val_data").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=reason):
        load_images("imagenet127_32_val", root=root)
