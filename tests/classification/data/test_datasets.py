import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from ssod_imwa.classification.data.datasets import (
    CIFAR10_CLASSES,
    ClassificationDataset,
    load_cifar,
    load_cifar10_lt100,
    load_digit_images,
    load_image_folder,
    read_into_memory,
    warn_of_alike_names,
)
from ssod_imwa.classification.data.imbalance import ImbalanceOptions, SelectionOptions
from ssod_imwa.classification.data.splits import impose_imbalance
from ssod_imwa.errors import DataError


def thinned_to(dataset, *, split="cao", **settings):
    return impose_imbalance(dataset, ImbalanceOptions(**settings), SelectionOptions(split=split))


@pytest.fixture
def tree(tmp_path, write_image):
    """Writes FOLDER/CLASS/N.png: tree(cat=2, dog=1)."""

    def write(**counts):
        for name, count in counts.items():
            (tmp_path / "tree" / name).mkdir(parents=True)
            for i in range(count):
                write_image(tmp_path / "tree" / name / f"{i}.png", width=8, height=6)
        return tmp_path / "tree"

    return write


def in_memory(*counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return ClassificationDataset("x", labels, tuple("abcdefghij"[: len(counts)]), images=images)


# ------------------------------------------------------------------------------------- dataset


def test_subset_takes_images_and_labels_in_the_given_order():
    part = in_memory(2, 3).subset([4, 0])
    assert part.labels.tolist() == [1, 0]
    assert part.images[:, 0, 0, 0].tolist() == [4, 0]
    assert part.image(0).shape == (3, 2, 2)
    assert part.classes == ("a", "b")
    assert part.counts == [1, 1]


def test_subset_of_files_takes_files():
    dataset = ClassificationDataset("x", torch.tensor([0, 1, 1]), ("a", "b"), files=("p", "q", "r"))
    part = dataset.subset(np.array([2, 0]))
    assert (part.files, part.labels.tolist(), part.images) == (("r", "p"), [1, 0], None)


def test_a_class_may_be_absent_from_a_subset():
    assert in_memory(2, 3).subset([0]).counts == [1, 0]
    assert in_memory(2, 3).subset([]).counts == [0, 0]


def test_images_and_labels_have_to_fit():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="1 images and 2 labels"):
        ClassificationDataset("x", labels, ("a", "b"), files=("p",))
    images = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="either in memory or in files"):
        ClassificationDataset("x", labels, ("a", "b"), images=images, files=("p", "q"))
    with pytest.raises(DataError, match=r"x: labels are 0..1, with 1 classes they must be 0..0"):
        ClassificationDataset("x", labels, ("a",), files=("p", "q"))


# ----------------------------------------------------------------------------- imposed imbalance


def test_imbalance_is_imposed_on_a_balanced_set():
    thinned = thinned_to(in_memory(50, 50, 50), ratio=4)
    assert thinned.counts == [50, 25, 12]
    # Each label still belongs to its image: image i has the value i and the label i // 50.
    assert (thinned.images[:, 0, 0, 0] // 50).tolist() == thinned.labels.tolist()


def test_a_long_tailed_set_is_thinned():
    assert thinned_to(in_memory(100, 10, 1), ratio=4, split="first").counts == [4, 2, 1]
    assert thinned_to(in_memory(80, 40, 10, 10), ratio=2, profile="step").counts == [
        *[20, 20],
        *[10, 10],
    ]


def test_imbalance_beyond_the_images_names_the_data_set():
    with pytest.raises(DataError, match="x: class 1 has 5 images, 10 are asked"):
        thinned_to(in_memory(20, 5), ratio=1, maximum=10)
    with pytest.raises(DataError, match="leaves class 1 of 2 without images"):
        thinned_to(in_memory(20, 5), ratio=40, maximum=20)


# -------------------------------------------------------------------------------- image folders


def test_folder_becomes_files_with_sorted_classes(tree):
    root = tree(dog=1, cat=2)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    dataset = load_image_folder(root, name="pets")
    assert dataset.classes == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.labels.dtype == torch.int64
    names = [str(root / "cat" / "0.png"), str(root / "cat" / "1.png"), str(root / "dog" / "0.png")]
    assert list(dataset.files) == names
    assert dataset.image(0).shape == (3, 6, 8)


def test_numbers_as_folder_names_keep_their_order(tree):
    root = tree(**{"10": 1, "2": 1, "0": 1})
    assert load_image_folder(root, name="x").classes == ("0", "2", "10")


@pytest.mark.parametrize("backwards", [False, True])
def test_equal_numbers_come_in_the_same_order_on_every_disk(tree, monkeypatch, backwards):
    root = tree(**{"1": 1, "01": 1, "0": 1})
    listed = sorted(root.iterdir(), reverse=backwards)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(listed))
    assert load_image_folder(root, name="x").classes == ("0", "01", "1")


def test_class_order_can_be_given(tree):
    dataset = load_image_folder(tree(cat=2, dog=1), name="x", classes=("dog", "cat"))
    assert dataset.counts == [1, 2]


def test_images_in_subfolders_of_a_class_are_found(tree, write_image):
    root = tree(cat=1)
    write_image(root / "cat" / "images" / "a.JPEG")
    assert load_image_folder(root, name="x").counts == [2]


def test_folder_problems_are_named(tree, tmp_path):
    root = tree(cat=1, dog=0)
    with pytest.raises(DataError, match=r"x: 1 of 2 classes have no images: 1 \(dog\)"):
        load_image_folder(root, name="x")
    with pytest.raises(DataError, match="no folder for 1 of 3 classes: dogs; nearest: dog"):
        load_image_folder(root, name="x", classes=("cat", "dog", "dogs"))
    with pytest.raises(DataError, match="has a folder dog that is none of the 1 classes"):
        load_image_folder(root, name="x", classes=("cat",))
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        load_image_folder(tmp_path / "nowhere", name="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no folder"):
        load_image_folder(tmp_path / "empty", name="x")


def test_files_are_read_into_memory(tree):
    dataset = load_image_folder(tree(cat=2, dog=1), name="x")
    read = read_into_memory(dataset)
    assert read.images.shape == (3, 3, 6, 8)
    assert read.images.dtype == torch.uint8
    for i in range(3):
        pixels = np.asarray(Image.open(dataset.files[i])).transpose(2, 0, 1)
        assert np.array_equal(read.image(i).numpy(), pixels)
    assert (read.files, read.labels.tolist()) == ((), dataset.labels.tolist())
    assert read_into_memory(read) is read


def test_images_of_two_sizes_do_not_go_into_memory(tree, write_image):
    root = tree(cat=1)
    write_image(root / "cat" / "9.png", width=5, height=4)
    with pytest.raises(DataError, match=r"9.png is 5 x 4 pixels, .*0.png is 8 x 6"):
        read_into_memory(load_image_folder(root, name="x"))


# ---------------------------------------------------------------------------------------- CIFAR


def write_pickles(monkeypatch, root, reader, files, meta):
    """Ours in the place of the original files; torchvision checks them by their MD5."""
    folder = root / reader.base_folder
    folder.mkdir()
    sums = {}
    for name, content in [*files.items(), meta]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    names = list(files)
    monkeypatch.setattr(reader, "train_list", [[n, sums[n]] for n in names[:-1]])
    monkeypatch.setattr(reader, "test_list", [[names[-1], sums[names[-1]]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": sums[meta[0]]})


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_pickles(monkeypatch, tmp_path, classes):
    reader = CIFAR10 if classes == 10 else CIFAR100
    key = "labels" if classes == 10 else "fine_labels"
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    files = {
        "one": {"data": rows[:2], key: [3, 1]},
        "two": {"data": rows[2:4], key: [0, 9]},
        "test": {"data": rows[4:], key: [5, 5]},
    }
    names = [f"class {i}" for i in range(classes)]
    meta_key = "label_names" if classes == 10 else "fine_label_names"
    meta = (reader.meta["filename"], {meta_key: names})
    write_pickles(monkeypatch, tmp_path, reader, files, meta)
    train = load_cifar(tmp_path, "train", classes=classes)
    # A row holds the red, then the green, then the blue plane.
    assert np.array_equal(train.images.numpy(), rows[:4].reshape(4, 3, 32, 32))
    assert (train.labels.tolist(), train.classes) == ([3, 1, 0, 9], tuple(names))
    assert train.images.is_contiguous()
    test = load_cifar(tmp_path, "test", classes=classes)
    assert np.array_equal(test.images.numpy(), rows[4:].reshape(2, 3, 32, 32))


def test_missing_cifar_says_where_it_is_sought(tmp_path):
    message = "CIFAR-100 not found or damaged: no whole cifar-100-python in"
    with pytest.raises(DataError, match=message):
        load_cifar(tmp_path, "train", classes=100)


def test_unknown_splits_and_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="classes = 20 is not allowed"):
        load_cifar(tmp_path, "train", classes=20)
    with pytest.raises(ValueError, match="split = 'val' is not allowed"):
        load_cifar(tmp_path, "val")
    with pytest.raises(ValueError, match="split = 'val' is not allowed"):
        load_digit_images("val")
    with pytest.raises(DataError, match=r"image folder .*val does not exist"):
        load_cifar10_lt100(tmp_path, "val")


def test_small_cifar10_lt_folder_is_read(tmp_path, write_image):
    for name in CIFAR10_CLASSES:
        write_image(tmp_path / "cifar10_lt100" / "test" / name / "00000.png", width=32, height=32)
    dataset = load_cifar10_lt100(tmp_path, "test")
    assert dataset.images.shape == (10, 3, 32, 32)
    assert dataset.counts == [1] * 10
    assert dataset.classes == CIFAR10_CLASSES


@pytest.mark.slow
def test_real_cifar10_lt_has_the_published_counts_and_thins(real_data):
    if not (real_data / "cifar10_lt100").is_dir():
        pytest.skip(f"no cifar10_lt100 in {real_data}")
    train = load_cifar10_lt100(real_data, "train")
    assert train.counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert train.images.shape == (12_406, 3, 32, 32)
    assert thinned_to(train, ratio=100, split="first").labels.equal(train.labels)
    assert thinned_to(train, ratio=50).counts[::9] == [2500, 50]
    assert thinned_to(train, ratio=10).counts[::9] == [500, 50]


# --------------------------------------------------------------------------------------- digits


def test_digit_images_are_divided_like_the_digit_scenes():
    target = pytest.importorskip("sklearn.datasets").load_digits().target
    seen = [0] * 10
    expected = {"train": [], "test": []}
    for label in target:
        expected["test" if seen[label] % 5 == 0 else "train"].append(int(label))
        seen[label] += 1
    for split in ("train", "test"):
        assert load_digit_images(split).labels.tolist() == expected[split]


def test_digit_images_are_enlarged_bilinearly():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = load_digit_images("test")
    assert dataset.images.shape == (364, 3, 32, 32)
    assert dataset.images.dtype == torch.uint8
    assert dataset.images[:, 0].equal(dataset.images[:, 2])
    # The first image of the data set is for testing. Pixel y lies at (y + 1/2)/4 - 1/2 of 8.
    at = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)
    rows = np.array([np.interp(at, np.arange(8), row) for row in digits.images[0]])
    both = np.array([np.interp(at, np.arange(8), column) for column in rows.T]).T
    assert np.array_equal(dataset.images[0, 0].numpy(), np.round(both * 255 / 16))


def test_long_tailed_digits_fall_exponentially():
    counts = thinned_to(load_digit_images("train"), ratio=20).counts
    assert counts == [int(142 * 20 ** (-c / 9)) for c in range(10)]


def test_many_names_that_differ_by_case_alone_are_one_warning(caplog):
    names = [f"owl {i}" for i in range(9)]
    warn_of_alike_names("birds", [*names, *map(str.upper, names)])
    assert caplog.messages == [
        "birds: classes differ by case or spaces alone: 'owl 0' and 'OWL 0', 'owl 1' and 'OWL 1', "
        "'owl 2' and 'OWL 2' and 6 more"
    ]
    warn_of_alike_names("birds", names)
    assert len(caplog.messages) == 1
