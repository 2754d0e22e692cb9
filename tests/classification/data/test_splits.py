from dataclasses import replace

import numpy as np
import pytest
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.imbalance import ImbalanceOptions, SelectionOptions
from ssod_imwa.classification.data.splits import (
    impose_imbalance,
    join_unlabeled,
    labeled_among,
    split_off_unlabeled,
    with_labeled,
)
from ssod_imwa.classification.data.unlabeled import UnlabeledOptions
from ssod_imwa.errors import DataError


def dataset(count=60, *, name="x", seed=0, size=4, classes=3):
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
    labels = torch.arange(count) % classes
    return ClassificationDataset(name, labels, tuple("abcdef"[:classes]), images=images)


def files(*names, name="y"):
    labels = torch.zeros(len(names), dtype=torch.int64)
    return ClassificationDataset(name, labels, ("a",), files=names)


def test_a_set_falls_into_labeled_and_unlabeled_images():
    whole, imbalance = dataset(), ImbalanceOptions(ratio=4, maximum=8)
    selection = SelectionOptions(seed=5)
    labeled = impose_imbalance(whole, imbalance, selection)
    unlabeled = split_off_unlabeled(whole, imbalance, selection, UnlabeledOptions(maximum=12))
    assert (labeled.counts, unlabeled.counts) == ([8, 4, 2], [12, 6, 3])
    assert (labeled.is_labeled, unlabeled.is_labeled) == (True, False)
    pixels = {image.numpy().tobytes() for image in labeled.images}
    assert not any(image.numpy().tobytes() in pixels for image in unlabeled.images)


def test_a_share_of_each_class_keeps_its_labels():
    whole, imbalance = dataset(), ImbalanceOptions(percent=12.5)  # 2.5 of 20 images
    selection = SelectionOptions(split="first")
    labeled = impose_imbalance(whole, imbalance, selection)
    assert labeled.counts == [2, 2, 2]
    assert labeled.images.equal(whole.images[[0, 3, 1, 4, 2, 5]])
    rest = split_off_unlabeled(whole, imbalance, selection, UnlabeledOptions())
    assert rest.counts == [18, 18, 18]
    joint = UnlabeledOptions(membership="joint")
    everything = split_off_unlabeled(whole, imbalance, selection, joint)
    assert everything.counts == [20, 20, 20]


def test_a_class_that_would_keep_no_label_is_named():
    with pytest.raises(DataError, match=r"class 0 \(a\) keeps none of its 20 images .*PERCENT = 2"):
        impose_imbalance(dataset(), ImbalanceOptions(percent=2), SelectionOptions())


def test_held_out_images_are_in_neither_part():
    whole, imbalance = dataset(), ImbalanceOptions(percent=50)
    selection = SelectionOptions(hold_out=4)
    labeled = impose_imbalance(whole, imbalance, selection)
    rest = split_off_unlabeled(whole, imbalance, selection, UnlabeledOptions())
    assert (labeled.counts, rest.counts) == ([8, 8, 8], [8, 8, 8])


@pytest.mark.parametrize("maximum", [0, 8])
def test_a_class_that_is_held_out_whole_is_named(maximum):
    options = ImbalanceOptions(ratio=4, maximum=maximum)
    message = r"x: class 0 \(a\) has 20 images, CLS.IMBALANCE.HOLD_OUT = 20 of each class"
    with pytest.raises(DataError, match=message):
        impose_imbalance(dataset(), options, SelectionOptions(hold_out=20))


def test_images_in_both_sets_are_refused_or_count_once():
    labeled, other = dataset(6), dataset(9, name="other", seed=1)
    mixed = join_unlabeled(other, labeled.subset([4, 5]))
    with pytest.raises(DataError, match=r"2 of 6 labeled images .*number 4 .*MEMBERSHIP joint"):
        with_labeled(mixed, labeled, "disjoint")
    assert with_labeled(other, labeled, "disjoint") is other
    joint = with_labeled(mixed, labeled, "joint")
    assert joint.images.equal(torch.cat([mixed.images, labeled.images[:4]]))
    assert not joint.is_labeled


def test_files_are_told_apart_by_their_paths():
    with pytest.raises(DataError, match=r"the first is 2\.png"):
        with_labeled(files("1.png", "2.png"), files("2.png", "3.png", name="z"), "disjoint")
    joint = with_labeled(files("1.png", "2.png"), files("2.png", "3.png", name="z"), "joint")
    assert joint.files == ("1.png", "2.png", "3.png")


def test_sets_of_different_kinds_do_not_join():
    with pytest.raises(DataError, match=r"images of y are in files .*of x in memory .*IN_MEMORY"):
        join_unlabeled(dataset(), files("1.png"))
    with pytest.raises(DataError, match="x have 4 x 4 pixels, those of big 8 x 8"):
        join_unlabeled(dataset(), dataset(name="big", size=8))


def test_labeled_images_among_the_unlabeled_are_told_by_their_pixels():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 2, 2).contiguous()
    whole = ClassificationDataset("six", torch.arange(6) % 2, ("a", "b"), images=images)
    unlabeled = replace(whole.subset([5, 1, 0, 3]), is_labeled=False)
    found = labeled_among(unlabeled, whole.subset([0, 2, 3]))
    assert found.tolist() == [False, False, True, True]
