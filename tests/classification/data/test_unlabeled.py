import numpy as np
import pytest

from ssod_imwa.classification.data.imbalance import choose_images, imbalanced_counts
from ssod_imwa.classification.data.unlabeled import (
    UnlabeledOptions,
    choose_unlabeled,
    unlabeled_counts,
)
from ssod_imwa.errors import DataError

# (C, maximum, ratio): counts and their sum, of the published protocols of CIFAR and STL-10.
COUNTS = {
    (10, 500, 100): [500, 299, 179, 107, 64, 38, 23, 13, 8, 5],
    (10, 1500, 100): [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15],
    (10, 4000, 100): [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40],
    (10, 3000, 100): [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30],
    (10, 500, 150): [500, 286, 164, 94, 53, 30, 17, 10, 5, 3],
    (10, 1500, 150): [1500, 859, 492, 282, 161, 92, 53, 30, 17, 10],
    (10, 4000, 150): [4000, 2292, 1313, 752, 431, 247, 141, 81, 46, 26],
    (10, 3000, 150): [3000, 1719, 985, 564, 323, 185, 106, 60, 34, 20],
    (10, 150, 10): [150, 116, 89, 69, 53, 41, 32, 25, 19, 15],
    (10, 150, 20): [150, 107, 77, 55, 39, 28, 20, 14, 10, 7],
    (10, 450, 10): [450, 348, 269, 208, 161, 125, 96, 75, 58, 45],
    (10, 450, 20): [450, 322, 231, 165, 118, 85, 61, 43, 31, 22],
}
# (maximum, ratio): last count and sum, of CIFAR-100.
SUMS = {
    (50, 10): (5, 1911),
    (150, 10): (15, 5835),
    (400, 10): (40, 15651),
    (300, 10): (30, 11720),
    (50, 20): (2, 1545),
    (150, 20): (7, 4741),
    (400, 20): (20, 12719),
    (300, 20): (15, 9527),
}


@pytest.mark.parametrize(("setting", "counts"), COUNTS.items())
def test_counts_are_those_of_the_published_protocols(setting, counts):
    classes, maximum, ratio = setting
    assert imbalanced_counts(classes, maximum=maximum, ratio=ratio) == counts
    options = UnlabeledOptions(maximum=maximum)
    assert unlabeled_counts(classes, options, labeled_ratio=ratio) == counts


@pytest.mark.parametrize(("setting", "expected"), SUMS.items())
def test_counts_of_100_classes_have_the_published_ends_and_sums(setting, expected):
    maximum, ratio = setting
    counts = unlabeled_counts(100, UnlabeledOptions(maximum=maximum, ratio=ratio), labeled_ratio=7)
    assert (counts[0], counts[-1], sum(counts)) == (maximum, *expected)


def test_other_shapes_are_level_or_rise():
    reversed_ = UnlabeledOptions(maximum=4000, shape="reversed")
    assert unlabeled_counts(10, reversed_, labeled_ratio=100) == COUNTS[10, 4000, 100][::-1]
    uniform = UnlabeledOptions(maximum=4000, shape="uniform")
    assert unlabeled_counts(10, uniform, labeled_ratio=100) == [4000] * 10
    step = unlabeled_counts(4, UnlabeledOptions(maximum=9), labeled_ratio=3, profile="step")
    assert step == [9, 9, 3, 3]


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 30))


def daso_split(labels, labeled, unlabeled, *, seed, hold_out):
    """DASO's order of draws, written out: hold-out, pools, and each pool thinned, all by one seed.

    `labeled` and `unlabeled` are counts by class; a level `unlabeled` is not thinned.
    """
    classes = range(len(labeled))
    positions = np.arange(len(labels))
    if hold_out:
        generator = np.random.RandomState(seed)
        rest = []
        for c in classes:
            of_class = positions[labels == c]
            generator.shuffle(of_class)
            rest.append(of_class[hold_out:])
        positions = np.concatenate(rest)
    generator = np.random.RandomState(seed)
    pools = {"labeled": [], "unlabeled": []}
    for c in classes:
        of_class = positions[labels[positions] == c]
        generator.shuffle(of_class)
        pools["labeled"].append(of_class[: max(labeled)])
        pools["unlabeled"].append(of_class[max(labeled) : max(labeled) + max(unlabeled)])
    chosen = {"labeled": [], "unlabeled": []}
    for name, counts in (("labeled", labeled), ("unlabeled", unlabeled)):
        order = list(classes) if counts[0] >= counts[-1] else list(classes)[::-1]
        generator = np.random.RandomState(seed)
        for c in order:
            if counts[0] != counts[-1]:
                generator.shuffle(pools[name][c])
            chosen[name].append(pools[name][c][: counts[c]])
    return [sorted(np.concatenate(chosen[name])) for name in ("labeled", "unlabeled")]


@pytest.mark.parametrize("hold_out", [0, 5])
@pytest.mark.parametrize("unlabeled", [[12, 8, 5, 3], [12] * 4, [3, 5, 8, 12]])
def test_pools_are_those_of_dasos_draws(unlabeled, hold_out):
    labeled, settings = [8, 5, 4, 2], {"seed": 3, "hold_out": hold_out}
    expected = daso_split(LABELS, labeled, unlabeled, **settings)
    settings["split"] = "pools"
    assert sorted(choose_images(LABELS, labeled, **settings)) == expected[0]
    assert sorted(choose_unlabeled(LABELS, labeled, unlabeled, **settings)) == expected[1]


def test_acrs_images_are_the_first_of_each_class_labeled_ones_included():
    labeled, unlabeled = [4, 2, 1, 1], [10, 6, 3, 2]
    of_class = [np.flatnonzero(c == LABELS) for c in range(4)]
    chosen = choose_unlabeled(LABELS, labeled, unlabeled, split="first", membership="joint")
    expected = [x[: n + m] for x, n, m in zip(of_class, labeled, unlabeled, strict=True)]
    assert sorted(chosen) == sorted(np.concatenate(expected))
    assert set(choose_images(LABELS, labeled, split="first")) <= set(chosen)


@pytest.mark.parametrize("split", ["cao", "first", "pools"])
@pytest.mark.parametrize("hold_out", [0, 5])
def test_disjoint_sets_share_no_image_and_joint_ones_hold_all(split, hold_out):
    labeled, unlabeled = [8, 5, 4, 2], [12, 8, 5, 3]
    settings = {"split": split, "seed": 1, "hold_out": hold_out}
    known = choose_images(LABELS, labeled, **settings)
    apart = choose_unlabeled(LABELS, labeled, unlabeled, **settings)
    together = choose_unlabeled(LABELS, labeled, unlabeled, membership="joint", **settings)
    assert np.bincount(LABELS[known]).tolist() == labeled
    assert np.bincount(LABELS[apart]).tolist() == unlabeled
    assert len(set(apart)) == len(apart)
    assert not set(known) & set(apart)
    assert sorted(together) == sorted([*known, *apart])


def test_no_counts_take_all_that_are_left():
    labeled = [8, 5, 4, 2]
    rest = choose_unlabeled(LABELS, labeled, None, seed=1)
    known = choose_images(LABELS, labeled, seed=1)
    assert sorted([*known, *rest]) == list(range(len(LABELS)))


def test_a_class_without_enough_images_is_named_with_both_numbers():
    with pytest.raises(DataError, match="class 1 has 30 images, 5 labeled and 26 unlabeled ones"):
        choose_unlabeled(LABELS, [8, 5, 4, 2], [12, 26, 5, 3])
    with pytest.raises(DataError, match="class 0 has 30 images, 30 of each class are held out"):
        choose_unlabeled(LABELS, [1] * 4, [1] * 4, hold_out=30)
