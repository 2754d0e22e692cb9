import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssod_imwa.classification.data import tiered_imagenet
from ssod_imwa.classification.data.catalog import load_images
from ssod_imwa.errors import DataError

IMAGES = {"train/n2": 58, "train/n1": 55, "test/n0": 61}
LABELS = {"n1": 0, "n2": 1, "n0": 2}  # frequent classes first


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Images whose first pixel numbers them: 3 classes, of which one is rare."""
    root = tmp_path_factory.mktemp("tiered")
    for place, count in IMAGES.items():
        folder = root / "tiered_imagenet" / place
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.full((4, 4, 3), i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


@pytest.fixture
def root(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tiered_imagenet, "PARTS", {"train": 2, "test": 1})
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def numbers(dataset, class_name):
    """Which images of a class are there."""
    return dataset.images[dataset.labels == LABELS[class_name], 0, 0, 0].tolist()


def test_frequent_classes_keep_what_is_not_tested_and_rare_ones_five(root):
    train, test = (load_images(f"tiered_imagenet_{part}", root=root) for part in ("train", "test"))
    assert train.classes == test.classes == ("n1", "n2", "n0")
    assert train.counts == [5, 8, 5]
    assert test.counts == [50, 50, 50]
    for place, count in IMAGES.items():
        name = Path(place).name
        trained, tested = numbers(train, name), numbers(test, name)
        assert not set(trained) & set(tested)
        if name != "n0":
            assert sorted(trained + tested) == list(range(count))
        assert tested != list(range(50))  # drawn, not the first


def test_a_class_does_not_depend_on_the_others(root):
    before = load_images("tiered_imagenet_train", root=root)
    shutil.rmtree(root / "tiered_imagenet/train/n2")
    shutil.copytree(root / "tiered_imagenet/test/n0", root / "tiered_imagenet/train/n2")
    after = load_images("tiered_imagenet_train", root=root)
    for name in ("n1", "n0"):
        assert numbers(after, name) == numbers(before, name)


def test_other_classes_and_short_ones_are_refused(root):
    for file in list((root / "tiered_imagenet/test/n0").iterdir())[:7]:
        file.unlink()
    with pytest.raises(DataError, match=r"class n0 has 54 images \(must be at least 55\)"):
        load_images("tiered_imagenet_test", root=root)
    shutil.rmtree(root / "tiered_imagenet/train/n2")
    with pytest.raises(DataError, match=r"train has 1 classes \(must be the 2 of few-shot"):
        load_images("tiered_imagenet_train", root=root)


def test_there_are_the_511_classes_of_the_paper():
    assert sum(tiered_imagenet.PARTS.values()) == 511
