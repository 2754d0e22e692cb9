import numpy as np
import pytest

from ssod_imwa.classification.data.samplers import class_sampler
from ssod_imwa.classification.data.subsets import (
    SubsetOptions,
    balanced_subset,
    member_positions,
)
from ssod_imwa.errors import DataError

COUNTS = [64, 16, 4]
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], COUNTS))


def test_short_classes_give_all_their_images_once():
    subset = balanced_subset(LABELS, 3, 10, seed=1, number=0)
    assert np.bincount(LABELS[subset]).tolist() == [10, 10, 4]
    assert len(set(subset)) == 24


def test_large_enough_classes_make_the_subset_balanced():
    subset = balanced_subset(LABELS, 3, 4, seed=1, number=0)
    assert np.bincount(LABELS[subset]).tolist() == [4, 4, 4]


def test_subsets_are_functions_of_seed_and_number():
    subsets = [
        balanced_subset(LABELS, 3, 5, seed=seed, number=number).tolist()
        for seed, number in [(1, 0), (1, 0), (1, 1), (2, 0)]
    ]
    assert subsets[0] == subsets[1]
    assert len({tuple(subset) for subset in subsets}) == 3


def tolerance(share):
    """Five standard deviations of a binomial share of 300."""
    return 5 * np.sqrt(share * (1 - share) / 300)


def test_images_are_equally_likely_over_many_subsets():
    times = np.zeros(84)
    for number in range(300):
        times[balanced_subset(LABELS, 3, 4, seed=1, number=number)] += 1
    for c, count in enumerate(COUNTS):
        share = 4 / count
        assert (np.abs(times[c == LABELS] / 300 - share) <= tolerance(share)).all()


def test_subset_arguments_are_checked():
    with pytest.raises(ValueError, match="per_class = 0 is not allowed"):
        balanced_subset(LABELS, 3, 0, seed=1, number=0)
    with pytest.raises(DataError, match="class 3 has no images"):
        balanced_subset(LABELS, 4, 2, seed=1, number=0)


# ---------------------------------------------------------------------------------- of a member


@pytest.mark.parametrize("member", [0, 1])
def test_a_members_images_are_the_union_of_its_subsets(member):
    options = SubsetOptions(per_class=8, subsets=2)
    positions = member_positions(LABELS, 3, options, seed=1, member=member)
    a, b = (
        set(balanced_subset(LABELS, 3, 8, seed=1, number=number).tolist())
        for number in (2 * member, 2 * member + 1)
    )
    assert set(positions.tolist()) == a | b
    assert len(positions) == len(a | b)
    head, middle, tail = np.bincount(LABELS[positions])
    assert head > middle > tail == 4  # no longer balanced


def test_one_subset_is_the_members_own():
    options = SubsetOptions(per_class=8)
    positions = member_positions(LABELS, 3, options, seed=1, member=3)
    assert positions.tolist() == balanced_subset(LABELS, 3, 8, seed=1, number=3).tolist()


def test_the_sampler_reads_the_union_and_nothing_else():
    options = SubsetOptions(per_class=3, subsets=2)
    positions = member_positions(LABELS, 3, options, seed=1, member=1)
    settings = {"seed": 1, "member": 1, "iterations": 9, "options": options}
    order = class_sampler("balanced_subset", LABELS, 3, len(positions), **settings)
    assert sorted(order.batch(0)) == positions.tolist()
