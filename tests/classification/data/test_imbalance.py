from fractions import Fraction

import numpy as np
import pytest
import torch

from ssod_imwa.classification.data.imbalance import (
    choose_images,
    class_orders,
    held_out_images,
    imbalanced_counts,
    largest_maximum,
    positions_by_class,
)
from ssod_imwa.data.profiles import exponential_profile, step_profile
from ssod_imwa.errors import DataError

CIFAR10_LT100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

# classes, maximum, ratio: total and last class of the long-tailed set, total of the step set, and
# classes with more than 100, 20..100 and fewer than 20 images. Totals of CIFAR with ratio 10, 50
# and 100 are those that papers and data releases state.
PUBLISHED = [
    (10, 5000, 10, 20_431, 500, 27_500, (10, 0, 0)),
    (10, 5000, 50, 13_996, 100, 25_500, (9, 1, 0)),
    (10, 5000, 100, 12_406, 50, 25_250, (8, 2, 0)),
    (10, 5000, 200, 11_203, 25, 25_125, (7, 3, 0)),
    (100, 500, 10, 19_573, 50, 27_500, (69, 31, 0)),
    (100, 500, 50, 12_608, 10, 25_500, (41, 41, 18)),
    (100, 500, 100, 10_847, 5, 25_250, (35, 35, 30)),
    (100, 500, 200, 9_502, 2, 25_100, (30, 31, 39)),
    (200, 500, 10, 39_072, 50, 55_000, (139, 61, 0)),
    (200, 500, 100, 21_549, 5, 50_500, (70, 70, 60)),
]

# Labeled and unlabeled parts of CIFAR-10-LT in semi-supervised work (DASO, ACR).
SEMI_SUPERVISED = {
    (500, 100): [500, 299, 179, 107, 64, 38, 23, 13, 8, 5],
    (1500, 100): [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15],
    (4000, 100): [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40],
    (3000, 100): [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30],
    (500, 150): [500, 286, 164, 94, 53, 30, 17, 10, 5, 3],
    (1500, 150): [1500, 859, 492, 282, 161, 92, 53, 30, 17, 10],
    (4000, 150): [4000, 2292, 1313, 752, 431, 247, 141, 81, 46, 26],
    (3000, 150): [3000, 1719, 985, 564, 323, 185, 106, 60, 34, 20],
    (150, 10): [150, 116, 89, 69, 53, 41, 32, 25, 19, 15],
    (450, 20): [450, 322, 231, 165, 118, 85, 61, 43, 31, 22],
}


# -------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("classes", "maximum", "ratio", "total", "last", "step_total", "groups"), PUBLISHED
)
def test_counts_are_the_published_ones(classes, maximum, ratio, total, last, step_total, groups):
    counts = imbalanced_counts(classes, maximum=maximum, ratio=ratio)
    assert (counts[0], counts[-1], sum(counts), len(counts)) == (maximum, last, total, classes)
    many, few = sum(n > 100 for n in counts), sum(n < 20 for n in counts)
    assert (many, classes - many - few, few) == groups
    step = imbalanced_counts(classes, maximum=maximum, ratio=ratio, profile="step")
    assert step == [maximum] * (classes // 2) + [int(maximum / ratio)] * (classes // 2)
    assert sum(step) == step_total


@pytest.mark.parametrize(("maximum", "ratio"), SEMI_SUPERVISED)
def test_counts_of_semi_supervised_sets_are_the_published_ones(maximum, ratio):
    expected = SEMI_SUPERVISED[maximum, ratio]
    assert imbalanced_counts(10, maximum=maximum, ratio=ratio) == expected


@pytest.mark.parametrize("maximum", [100, 49 * 3, 4999])
@pytest.mark.parametrize(("classes", "ratio"), [(10, 100), (100, 50), (7, 3.5), (49, 49), (3, 49)])
def test_counts_round_down_the_exact_power(classes, ratio, maximum):
    for c, count in enumerate(imbalanced_counts(classes, maximum=maximum, ratio=ratio)):
        # count <= maximum ratio^(-c/(C-1)) < count + 1, in integers, without any root.
        exact = Fraction(maximum) ** (classes - 1) / Fraction(ratio) ** c
        assert Fraction(count) ** (classes - 1) <= exact < Fraction(count + 1) ** (classes - 1)


def test_floating_point_takes_no_image_away():
    assert 49 * 49.0**-1 < 1
    assert imbalanced_counts(3, maximum=49, ratio=49) == [49, 7, 1]


def test_ratio_one_is_balanced_and_one_class_is_allowed():
    for profile in ("exponential", "step"):
        assert imbalanced_counts(4, maximum=7, ratio=1, profile=profile) == [7] * 4
    assert imbalanced_counts(1, maximum=7, ratio=5) == [7]


def test_of_an_odd_number_of_classes_the_larger_half_is_small():
    assert imbalanced_counts(5, maximum=10, ratio=10, profile="step") == [10, 10, 1, 1, 1]


def test_imbalance_that_empties_a_class_is_refused():
    message = "ratio = 1000 with maximum = 500 leaves class 9 of 10 without images"
    with pytest.raises(DataError, match=message):
        imbalanced_counts(10, maximum=500, ratio=1000)
    with pytest.raises(DataError, match="leaves class 5 of 10"):
        imbalanced_counts(10, maximum=500, ratio=1000, profile="step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5}, "ratio = 0.5 is not allowed"),
        ({"ratio": float("nan")}, "ratio = nan is not allowed"),
        ({"ratio": float("inf")}, "ratio = inf is not allowed"),
        ({"maximum": 0}, "maximum = 0 is not allowed"),
        ({"classes": 0}, "classes = 0 is not allowed"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    arguments = {"classes": 10, "maximum": 500, "ratio": 10, **arguments}
    with pytest.raises(DataError, match=message):
        imbalanced_counts(arguments.pop("classes"), **arguments)


def test_an_unknown_choice_is_refused_with_those_allowed():
    with pytest.raises(ValueError, match=r"profile = 'linear' is not allowed .*'exponential', 's"):
        imbalanced_counts(10, maximum=500, ratio=10, profile="linear")
    with pytest.raises(ValueError, match="profile = 'linear'"):
        largest_maximum([5, 5], ratio=2, profile="linear")
    with pytest.raises(ValueError, match=r"split = 'cui' is not allowed .*'cao', 'first'"):
        choose_images([0, 1], [1, 1], split="cui")


def test_profiles_fall_from_one_to_one_over_ratio():
    exponential = exponential_profile(10, 100)
    assert np.allclose(np.diff(np.log(exponential)), -np.log(100) / 9)
    assert (exponential[0], exponential[-1]) == (1, 0.01)
    assert step_profile(3, 8) == [1, 0.125, 0.125]


# ------------------------------------------------------------------------------------ thinning


@pytest.mark.parametrize(("ratio", "maximum"), [(100, 5000), (50, 2500), (10, 500), (1, 50)])
def test_cifar10_lt_is_thinned_to_a_smaller_ratio(ratio, maximum):
    assert largest_maximum(CIFAR10_LT100, ratio=ratio) == maximum
    counts = imbalanced_counts(10, maximum=maximum, ratio=ratio)
    assert counts[0] == ratio * counts[-1]
    assert all(count <= n for count, n in zip(counts, CIFAR10_LT100, strict=True))


@pytest.mark.parametrize("profile", ["exponential", "step"])
@pytest.mark.parametrize("ratio", [1, 2, 3.5, 10])
def test_largest_maximum_agrees_with_trying_all(profile, ratio):
    available = [60, 31, 44, 25, 9]
    fitting = []
    for maximum in range(int(np.ceil(ratio)), 61):
        counts = imbalanced_counts(5, maximum=maximum, ratio=ratio, profile=profile)
        fits = all(count <= n for count, n in zip(counts, available, strict=True))
        if fits and maximum / ratio <= available[-1]:
            fitting.append(maximum)
    assert largest_maximum(available, ratio=ratio, profile=profile) == max(fitting)


@pytest.mark.parametrize(("available", "ratio"), [([5, 0, 5], 1), ([5, 5, 5], 10), ([0, 0], 1)])
def test_thinning_that_empties_a_class_is_refused(available, ratio):
    with pytest.raises(DataError, match="is not possible"):
        largest_maximum(available, ratio=ratio)


# -------------------------------------------------------------------------------- which images


def labels_of(*counts, seed=0):
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


def test_caos_split_is_that_of_the_global_generator():
    labels = labels_of(40, 40, 40)
    counts = [40, 12, 5]
    expected = []
    np.random.seed(0)
    for c in range(3):
        of_class = [i for i, label in enumerate(labels) if label == c]
        np.random.shuffle(of_class)
        expected += of_class[: counts[c]]
    assert choose_images(labels, counts).tolist() == expected


def test_caos_split_leaves_the_global_generator_alone():
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    choose_images(labels_of(5, 5), [5, 2])
    assert np.random.random() == expected


def test_first_keeps_the_order_of_the_data_set():
    labels = labels_of(9, 9)
    chosen = choose_images(labels, [4, 2], split="first")
    expected = [*np.flatnonzero(labels == 0)[:4], *np.flatnonzero(labels == 1)[:2]]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("split", ["cao", "first"])
def test_smaller_sets_are_parts_of_larger_ones(split):
    labels = labels_of(50, 50, 50)
    large = choose_images(labels, [50, 25, 12], split=split, seed=3)
    small = choose_images(labels, [50, 10, 2], split=split, seed=3)
    assert set(small) <= set(large)
    assert np.bincount(labels[large]).tolist() == [50, 25, 12]
    assert len(set(large)) == len(large)


def test_seeds_choose_different_images_and_one_seed_the_same():
    labels = torch.from_numpy(labels_of(50, 50))
    chosen = [choose_images(labels, [20, 5], seed=seed).tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_too_few_images_of_a_class_are_refused():
    with pytest.raises(DataError, match="class 1 has 3 images, 4 are asked"):
        choose_images(labels_of(5, 3), [5, 4])


def test_positions_by_class_are_those_of_a_loop():
    labels = labels_of(3, 0, 5)
    groups = positions_by_class(labels, 4)
    assert [group.tolist() for group in groups] == [
        [i for i, label in enumerate(labels) if label == c] for c in range(4)
    ]


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_outside_the_classes_are_refused(labels):
    with pytest.raises(DataError, match=r"with 3 classes they must be 0..2"):
        positions_by_class(labels, 3)


@pytest.mark.parametrize("split", ["cao", "first", "pools"])
def test_held_out_images_are_those_that_no_split_takes(split):
    labels = np.random.default_rng(0).integers(0, 3, 60)
    choice = {"split": split, "seed": 5, "hold_out": 4}
    held_out = held_out_images(labels, 3, **choice)
    assert np.bincount(labels[held_out]).tolist() == [4, 4, 4]
    taken = np.concatenate(class_orders(labels, 3, **choice))
    assert sorted([*held_out, *taken]) == list(range(60))
