"""From configurations to labeled, unlabeled and test images; wrong ones are one line each."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data import catalog
from ssod_imwa.classification.data.build import build_data
from ssod_imwa.classification.data.datasets import (
    ClassificationDataset,
    load_digit_images,
    load_image_folder,
)
from ssod_imwa.errors import UserError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.open import open_task

CLASSES = ("cat", "dog")
DIGITS = {
    "CLS.IMBALANCE.RATIO": 10,
    "CLS.IMBALANCE.MAXIMUM": 20,
    "CLS.UNLABELED.MAXIMUM": 80,
}


@pytest.fixture
def config(tmp_path):
    """A function that loads a run of FixMatch on digits, changed by a mapping."""

    def load(changes=None, **settings):
        pairs = {
            "TASK": "classification",
            "CLS.ALGORITHM": "fixmatch",
            "OUTPUT_DIR": tmp_path / "run",
            "DATASETS.ROOT": tmp_path,
            "DATASETS.TRAIN": ["digit_images_train"],
            "DATASETS.TEST": ["digit_images_test"],
            "SOLVER.MAX_ITER": 2,
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.IMS_PER_BATCH_UNLABELED": 8,
            "MODEL.DEVICE": "cpu",
            **(DIGITS if changes is None else changes),
        }
        return load_config(overrides=[str(x) for pair in pairs.items() for x in pair])

    return load


@pytest.fixture
def folders(tmp_path):
    """Writes images by path below the root, each with its edge in pixels."""

    def write(**edges):
        generator = np.random.default_rng(len(edges))
        for path, edge in edges.items():
            file = tmp_path / f"{path}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)

    write(
        **{f"train/{c}/{i}": 32 for c in CLASSES for i in range(4)},
        **{f"test/{c}/{i}": 32 for c in CLASSES for i in range(2)},
        **{f"more/{i}": 32 for i in range(3)},
        **{f"more/deeper/down/{i}": 32 for i in range(3)},
        **{f"more/dog/{i}": 32 for i in range(2)},
    )
    return write


def own(**changes):
    """Settings of a user's folders."""
    return {
        "DATASETS.TRAIN": ["folder:train"],
        "DATASETS.TEST": ["folder:test"],
        "DATASETS.TRAIN_UNLABELED": ["folder:more"],
        "CLS.INPUT.IN_MEMORY": True,
        **changes,
    }


def batches_of(task):
    method = task.build_method(torch.device("cpu"))
    return task.build_batches(EpisodeSchedule(2), torch.device("cpu"), method.reads)


def problem_of(cfg):
    """The one line with which a run refuses what it is given."""
    with pytest.raises(UserError) as caught:
        next(batches_of(open_task(cfg))(0))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("split", ["cao", "first", "pools"])
@pytest.mark.parametrize("shape", ["consistent", "uniform", "reversed"])
def test_digits_are_labeled_unlabeled_or_neither(config, split, shape):
    changes = {**DIGITS, "CLS.IMBALANCE.SPLIT": split, "CLS.UNLABELED.SHAPE": shape}
    data = build_data(config(changes))
    assert data.train.counts == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    falling = [80, 61, 47, 37, 28, 22, 17, 13, 10, 8]
    expected = {"consistent": falling, "uniform": [80] * 10, "reversed": falling[::-1]}
    assert data.unlabeled.counts == expected[shape]
    labeled = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in labeled for image in data.unlabeled.images)


def test_a_supervised_run_learns_the_same_labeled_images(config):
    changes = {**DIGITS, "CLS.IMBALANCE.SPLIT": "pools", "CLS.IMBALANCE.HOLD_OUT": 20}
    semi = build_data(config(changes))
    changes = {**changes, "CLS.ALGORITHM": "erm"}
    del changes["CLS.UNLABELED.MAXIMUM"]
    pairs = {"DATASETS.TRAIN": ["digit_images_train"], "DATASETS.TEST": ["digit_images_test"]}
    pairs |= {"TASK": "classification", **changes}
    alone = build_data(load_config(overrides=[str(x) for pair in pairs.items() for x in pair]))
    assert alone.unlabeled is None
    assert alone.train.images.equal(semi.train.images)


def test_the_choice_follows_its_own_seed_or_the_runs(config):
    def images(**changes):
        return build_data(config({**DIGITS, **changes})).train.images

    key = "CLS.IMBALANCE.SEED"
    assert images(SEED=1).equal(images(SEED=2))
    assert images(**{key: 3}).equal(images(**{key: -1, "SEED": 3}))
    assert not images(**{key: -1, "SEED": 4}).equal(images(**{key: -1, "SEED": 3}))


@pytest.mark.usefixtures("folders")
def test_plain_folders_give_images_of_which_little_is_known(config):
    data = build_data(config(own()))
    assert (len(data.train), len(data.unlabeled)) == (8, 8)
    # Only a first subfolder that is named like a class tells one.
    assert sorted(data.unlabeled.labels.tolist()) == [-1] * 6 + [1] * 2
    assert data.train.counts == [4, 4]


@pytest.mark.usefixtures("folders")
def test_several_sets_are_joined_and_labeled_images_come_along_if_asked(config):
    key = "DATASETS.TRAIN_UNLABELED"
    data = build_data(config(own(**{key: ["folder:more", "folder:test"]})))
    assert len(data.unlabeled) == 12
    joint = build_data(config(own(**{"CLS.UNLABELED.MEMBERSHIP": "joint"})))
    assert len(joint.unlabeled) == 16
    both = {key: ["folder:more", "folder:train"], "CLS.UNLABELED.MEMBERSHIP": "joint"}
    assert len(build_data(config(own(**both))).unlabeled) == 16  # once each


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_hold_both_streams(config, in_memory):
    cfg = config(own(**{"CLS.INPUT.IN_MEMORY": in_memory, "DATALOADER.NUM_WORKERS": 0}))
    task = open_task(cfg)
    batches = batches_of(task)
    first, second = batches(0)
    assert list(first["unlabeled"].views) == ["weak", "strong"]
    assert first["labeled"].views["weak"].shape == (4, 3, 32, 32)
    for name, images in (("weak", 8), ("strong", 8)):
        assert first["unlabeled"].views[name].shape == (images, 3, 32, 32)
        assert not first["unlabeled"].views[name].equal(second["unlabeled"].views[name])
    truth = task.data.unlabeled.labels[first["unlabeled"].indices]
    assert first["unlabeled"].targets.equal(truth)
    (again,) = batches(1)
    assert again["unlabeled"].views["strong"].equal(second["unlabeled"].views["strong"])


def test_more_than_there_are_is_refused_with_both_numbers(config):
    message = problem_of(config({**DIGITS, "CLS.IMBALANCE.MAXIMUM": 200}))
    assert "class 0 has 142 images, 200 are asked" in message
    message = problem_of(config({**DIGITS, "CLS.UNLABELED.MAXIMUM": 125}))
    assert "class 0 has 142 images, 20 labeled and 125 unlabeled ones are asked" in message
    changes = {**DIGITS, "CLS.UNLABELED.SHAPE": "uniform", "CLS.UNLABELED.MAXIMUM": 140}
    assert "class 0 has 142 images, 20 labeled and 140 unlabeled" in problem_of(config(changes))


def test_nothing_left_to_be_unlabeled_is_refused(config):
    assert "no image of digit_images_train is unlabeled" in problem_of(config({}))


@pytest.mark.usefixtures("folders")
def test_named_sets_are_not_thinned(config):
    message = problem_of(config(own(**{"CLS.UNLABELED.MAXIMUM": 3})))
    assert "UNLABELED.MAXIMUM = 3 is not allowed with DATASETS.TRAIN_UNLABELED" in message


@pytest.mark.usefixtures("folders")
def test_the_same_image_in_both_sets_is_allowed_or_refused_by_recipe(config):
    changes = own(**{"DATASETS.TRAIN_UNLABELED": ["folder:more", "folder:train"]})
    message = problem_of(config(changes))
    assert "8 of 8 labeled images of folder:train are among the unlabeled" in message
    assert "MEMBERSHIP joint" in message
    build_data(config({**changes, "CLS.UNLABELED.MEMBERSHIP": "joint"}))


def test_a_set_that_holds_images_twice_says_so(config, monkeypatch, caplog):
    digits = load_digit_images("train")
    doubled = digits.subset([*range(len(digits))] * 2)
    monkeypatch.setitem(catalog._LOADERS, "doubled", lambda root: doubled)
    settings = {"DATASETS.TRAIN": ["doubled"], "CLS.IMBALANCE.PERCENT": 50}
    settings["CLS.IMBALANCE.SPLIT"] = "first"  # each class's first half is equal to its second
    with caplog.at_level(logging.WARNING):
        build_data(config(settings))
    expected = f"{len(digits)} of {len(digits)} unlabeled images are the same as labeled ones"
    assert expected in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build_data(config())
    assert "the same as labeled ones" not in caplog.text


def test_an_empty_unlabeled_set_is_refused_and_a_tiny_one_said(config, folders, caplog, tmp_path):
    (tmp_path / "none").mkdir()
    message = problem_of(config(own(**{"DATASETS.TRAIN_UNLABELED": ["folder:none"]})))
    assert message.endswith("none has no images (at least one is needed)")
    folders(**{"few/1": 32})
    changes = own(**{"DATASETS.TRAIN_UNLABELED": ["folder:few"]})
    with caplog.at_level(logging.WARNING):
        assert len(build_data(config(changes)).unlabeled) == 1
    assert "1 unlabeled images are fewer than SOLVER.IMS_PER_BATCH_UNLABELED = 8" in caplog.text


def test_a_class_without_labeled_images_is_named(config, folders, tmp_path, monkeypatch):
    digits = load_digit_images("train")
    rest = digits.subset(np.flatnonzero(digits.labels.numpy() != 7))
    monkeypatch.setitem(catalog._LOADERS, "no_sevens", lambda root: rest)
    settings = {"DATASETS.TRAIN": ["no_sevens"], "DATASETS.TRAIN_UNLABELED": ["digit_images_test"]}
    assert "1 of 10 classes have no labeled images: 7" in problem_of(config(settings))
    settings = {**DIGITS, "DATASETS.TRAIN": ["no_sevens"]}
    assert "class 7 has 0 images" in problem_of(config(settings))
    for file in (tmp_path / "train/cat").iterdir():
        file.unlink()
    assert "1 of 2 classes have no images: 0 (cat)" in problem_of(config(own()))


def test_labels_out_of_range_are_refused(config, monkeypatch):
    def broken(root):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        return ClassificationDataset("broken", torch.tensor([0, 2]), CLASSES, images=images)

    monkeypatch.setitem(catalog._LOADERS, "broken", broken)
    message = problem_of(config({**DIGITS, "DATASETS.TRAIN": ["broken"]}))
    assert message == "broken: labels are 0..2, with 2 classes they must be 0..1"


def test_sizes_that_do_not_go_together_are_refused(config, folders):
    changes = own(**{"CLS.INPUT.VIEWS": ["plain"], "CLS.INPUT.SIZE": 24})
    assert "view 'plain' is not allowed for images of 32 x 32" in problem_of(config(changes))
    folders(**{"more/9": 48})
    message = problem_of(config(own()))
    assert "is 48 x 48 pixels" in message
    assert "in memory all must have one size" in message
    folders(**{"large/1": 48})
    message = problem_of(config(own(**{"DATASETS.TRAIN_UNLABELED": ["folder:large"]})))
    assert "images of folder:large have 48 x 48 pixels, those of folder:train 32 x 32" in message
    changes = {"DATASETS.TRAIN_UNLABELED": ["folder:large"], "CLS.INPUT.IN_MEMORY": False}
    message = problem_of(config({**DIGITS, "CLS.UNLABELED.MAXIMUM": 0, **changes}))
    assert "are in files and those of digit_images_train in memory" in message


@pytest.mark.usefixtures("folders")
def test_files_of_a_registered_set_are_read_into_memory(config, tmp_path, monkeypatch):
    for part in ("train", "test"):
        dataset = load_image_folder(tmp_path / part, name=f"my_{part}")
        monkeypatch.setitem(catalog._LOADERS, dataset.name, lambda root, dataset=dataset: dataset)
    mine = {"DATASETS.TRAIN": ["my_train"], "DATASETS.TEST": ["my_test"]}
    data = build_data(config(own(**mine)))
    for dataset in (data.train, data.unlabeled, *data.tests):
        assert dataset.images.shape[1:] == (3, 32, 32)
    unlabeled = {"DATASETS.TRAIN_UNLABELED": ["my_test"]}
    assert len(build_data(config(own(**mine, **unlabeled))).unlabeled.images) == 4
    assert build_data(config(own(**mine, **{"CLS.INPUT.IN_MEMORY": False}))).train.images is None


def test_test_sets_need_the_same_classes(config, folders):
    folders(**{"test/owl/1": 32})
    assert "has a folder owl that is none of the 2 classes" in problem_of(config(own()))
    message = problem_of(config({**DIGITS, "DATASETS.TEST": ["folder:test"]}))
    assert "that is none of the 10 classes" in message or "no folder for" in message


def test_sets_without_labels_are_not_trained_or_tested_on(config, monkeypatch):
    def unlabeled(root):
        digits = load_digit_images("test")
        return ClassificationDataset(
            "bare", torch.full_like(digits.labels, -1), digits.classes, digits.images,
            is_labeled=False,
        )  # fmt: skip

    monkeypatch.setitem(catalog._LOADERS, "bare", unlabeled)
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        message = problem_of(config({**DIGITS, key: ["bare"]}))
        assert message.startswith("data set 'bare' has no labels")
    build_data(config({"DATASETS.TRAIN_UNLABELED": ["bare"]}))
