import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import STL10

from ssod_imwa.classification.data import stl10
from ssod_imwa.classification.data.catalog import load_images, load_unlabeled
from ssod_imwa.errors import DataError

COUNTS = {"train": 20, "test": 10, "unlabeled": 7}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The binaries of a few images, written as MATLAB does: column by column."""
    monkeypatch.setattr(stl10, "IMAGES", COUNTS)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in COUNTS.items():
        pixels = generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pixels.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        np.save(tmp_path / f"{part}.npy", pixels)
        if part != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{part}_y.bin")
    return tmp_path


def test_images_and_labels_are_those_of_torchvisions_reader(root):
    train = load_images("stl10_train", root=root)
    reader = STL10.__new__(STL10)  # without the check of the whole archive
    reader.root = str(root)
    images, labels = reader._STL10__loadfile("train_X.bin", "train_y.bin")
    assert np.array_equal(train.images.numpy(), images)
    assert train.labels.tolist() == labels.tolist() == [*range(10), *range(10)]
    assert np.array_equal(train.images.numpy(), np.load(root / "train.npy"))
    assert train.classes[2] == "car"


def test_unlabeled_images_have_no_truth(root):
    other = load_unlabeled("stl10_unlabeled", root=root, classes=stl10.CLASSES)
    assert len(other) == 7
    assert other.labels.unique().tolist() == [-1]
    assert other.counts == [0] * 10
    assert not other.is_labeled


def test_images_are_resized_when_they_are_read(root):
    small = load_images("stl10_32_test", root=root)
    assert small.images.shape == (10, 3, 32, 32)
    for image, pixels in zip(small.images, np.load(root / "test.npy"), strict=True):
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        picture = picture.resize((32, 32), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.asarray(picture, dtype=np.int32).transpose(2, 0, 1).copy())
        assert (image.int() - expected).abs().max() <= 1


def test_files_that_are_missing_cut_off_or_out_of_range_are_refused(root):
    folder = root / "stl10_binary"
    (folder / "test_X.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"test_X.bin has 4 bytes \(must be 276,480\)"):
        load_images("stl10_test", root=root)
    (folder / "train_y.bin").write_bytes(bytes([11] * 20))
    with pytest.raises(DataError, match=r"labels are 10..10, with 10 classes they must be 0..9"):
        load_images("stl10_train", root=root)
    (folder / "unlabeled_X.bin").unlink()
    with pytest.raises(DataError, match=r"unlabeled_X.bin does not exist"):
        load_images("stl10_unlabeled", root=root)
