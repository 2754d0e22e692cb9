from collections import Counter

import numpy as np
import pytest
import torch

from ssod_imwa.classification.data.samplers import (
    ClassAwareStream,
    ClassDraws,
    ClassSamplerOptions,
    class_sampler,
    mixed_probabilities,
    power_probabilities,
)
from ssod_imwa.errors import DataError

STRATEGIES = [
    "instance",
    "class",
    "square_root",
    "progressive",
    "reversed",
    "alternating",
    "balanced_subset",
]
COUNTS = [64, 16, 4]
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], COUNTS))


def sampler(strategy, batch_size=12, seed=1, member=0, iterations=500, **others):
    return class_sampler(
        strategy,
        LABELS,
        3,
        batch_size,
        seed=seed,
        member=member,
        iterations=iterations,
        **others,
    )


def class_shares(source, first, last):
    drawn = np.concatenate([LABELS[source.batch(t)] for t in range(first, last)])
    return np.bincount(drawn, minlength=3) / len(drawn)


def tolerance(share, draws):
    """Five standard deviations of a binomial share."""
    return 5 * np.sqrt(np.asarray(share) * (1 - np.asarray(share)) / draws)


# ------------------------------------------------------------------------------ all strategies


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_does_not_depend_on_what_was_read_before(strategy):
    read_through = sampler(strategy)
    expected = [read_through.batch(t) for t in range(40)]
    jumping = sampler(strategy)
    for t in np.random.default_rng(0).permutation(40):
        assert jumping.batch(int(t)) == expected[t]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeds_members_and_iterations_read_different_batches(strategy):
    batches = [
        sampler(strategy).batch(3),
        sampler(strategy).batch(4),
        sampler(strategy, member=1).batch(3),
        sampler(strategy, seed=2).batch(3),
    ]
    assert len({tuple(batch) for batch in batches}) == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_streams_of_other_names_read_different_batches(strategy):
    batches = [
        sampler(strategy, **options).batch(3)
        for options in ({}, {"kind": "labeled"}, {"kind": "unlabeled"}, {"kind": "balanced"})
    ]
    assert batches[0] == batches[1]
    assert len({tuple(batch) for batch in batches}) == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_successors_are_like_the_image_they_stand_in_for(strategy):
    source = sampler(strategy)
    for t in (0, 7):
        for slot, index in enumerate(source.batch(t)):
            assert source.successor(t, slot, 0) == index
            others = [source.successor(t, slot, steps) for steps in range(1, 4)]
            assert len({index, *others}) > 1
            by_turns = strategy == "alternating" and t % 2 == 0
            if strategy not in ("instance", "balanced_subset") and not by_turns:
                assert {LABELS[other] for other in others} == {LABELS[index]}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_labels_may_be_lists_arrays_and_tensors(strategy, kind):
    labels = kind(LABELS.tolist())
    source = class_sampler(strategy, labels, 3, 8, seed=1, member=0, iterations=10)
    assert source.batch(2) == sampler(strategy, batch_size=8, iterations=10).batch(2)
    assert all(type(position) is int for position in source.batch(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_negative_iterations_are_refused(strategy):
    with pytest.raises(IndexError, match="t = -1 is not allowed"):
        sampler(strategy).batch(-1)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_class_without_images_is_refused(strategy):
    with pytest.raises(DataError, match=r"class 1 has no images \(1 of 3 classes"):
        class_sampler(strategy, [0, 2, 2], 3, 4, seed=1, member=0, iterations=10)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"sampler = 'cube' is not allowed .*'progressive'"):
        sampler("cube")
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match="batch_size = 0 is not allowed"):
            sampler(strategy, batch_size=0)
    with pytest.raises(ValueError, match="per_draw = 0 is not allowed"):
        ClassSamplerOptions(per_draw=0)
    with pytest.raises(ValueError, match="iterations = 0 is not allowed"):
        sampler("progressive", iterations=0)


# ------------------------------------------------------------------------------------ instance


def test_instance_balance_reads_every_image_once_an_epoch():
    source = sampler("instance", batch_size=12)  # 84 images are 7 batches
    for epoch in range(3):
        read = [position for t in range(7 * epoch, 7 * epoch + 7) for position in source.batch(t)]
        assert sorted(read) == list(range(84))


# --------------------------------------------------------------------------------------- class


@pytest.mark.parametrize("per_draw", [1, 4])
def test_class_aware_passes_hold_every_class_equally_often(per_draw):
    source = ClassAwareStream(LABELS, 3, 3 * per_draw, seed=1, member=0, per_draw=per_draw)
    for t in range(20):
        labels = LABELS[source.batch(t)]
        assert np.bincount(labels).tolist() == [per_draw] * 3
        assert (labels.reshape(3, per_draw) == labels[::per_draw, None]).all()


@pytest.mark.parametrize("batch_size", [3, 7, 24])
def test_images_of_a_class_come_in_turn(batch_size):
    source = ClassAwareStream(LABELS, 3, batch_size, seed=1, member=0, per_draw=2)
    read = [position for t in range(1000 // batch_size) for position in source.batch(t)]
    for c, count in enumerate(COUNTS):
        of_class = [position for position in read if LABELS[position] == c]
        for begin in range(0, len(of_class) - count + 1, count):
            assert len(set(of_class[begin : begin + count])) == count
        times = Counter(of_class).values()
        assert max(times) - min(times) <= 1


def test_order_of_the_classes_changes_from_pass_to_pass():
    source = ClassAwareStream(LABELS, 3, 3, seed=1, member=0)
    assert len({tuple(LABELS[source.batch(t)]) for t in range(50)}) == 6


# --------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1, [64 / 84, 16 / 84, 4 / 84]),
        (0.5, [8 / 14, 4 / 14, 2 / 14]),
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (-1, [1 / 21, 4 / 21, 16 / 21]),
    ],
)
def test_probabilities_are_powers_of_the_counts(power, expected):
    assert np.allclose(power_probabilities(COUNTS, power), expected, rtol=1e-15)


def test_probabilities_of_an_empty_class_are_refused():
    with pytest.raises(DataError, match="class 0 has no images"):
        power_probabilities([0, 3], 0.5)


def test_mixed_probabilities_run_from_first_to_last_and_stay_there():
    first, last = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    for t, expected in [(0, [0.8, 0.2]), (5, [0.65, 0.35]), (10, [0.5, 0.5]), (99, [0.5, 0.5])]:
        assert np.allclose(mixed_probabilities(first, last, t=t, iterations=10), expected)


@pytest.mark.parametrize(("strategy", "power"), [("square_root", 0.5), ("reversed", -1)])
def test_classes_are_drawn_by_their_probabilities(strategy, power):
    weights = np.array(COUNTS, dtype=float) ** power
    expected = weights / weights.sum()
    shares = class_shares(sampler(strategy, batch_size=100), 0, 200)
    assert (np.abs(shares - expected) < tolerance(expected, 20_000)).all()


def test_progressive_balance_begins_with_instances_and_ends_with_classes():
    instance, balanced = np.array(COUNTS) / 84, np.full(3, 1 / 3)
    source = sampler("progressive", batch_size=200, iterations=1000)
    for first, weight in [(0, 0), (500, 0.5), (1000, 1)]:
        expected = (1 - weight) * instance + weight * balanced
        shares = class_shares(source, first, first + 40)
        # The probabilities move by less than 0.02 within these 40 iterations.
        assert (np.abs(shares - expected) < tolerance(expected, 8000) + 0.02).all()


def test_alternating_is_every_batch_of_both_samplers_by_turns():
    both = sampler("alternating", options=ClassSamplerOptions(per_draw=2))
    instance, balanced = sampler("instance"), sampler("class", options=ClassSamplerOptions(2))
    for t in range(20):
        assert both.batch(2 * t) == instance.batch(t)
        assert both.batch(2 * t + 1) == balanced.batch(t)
        assert both.successor(2 * t, 3, 1) == instance.successor(t, 3, 1)
        assert both.successor(2 * t + 1, 3, 1) == balanced.successor(t, 3, 1)


def test_images_within_a_class_are_equally_likely():
    source = sampler("square_root", batch_size=1000)
    drawn = np.concatenate([source.batch(t) for t in range(20)])
    for c, count in enumerate(COUNTS):
        times = np.bincount(drawn[LABELS[drawn] == c], minlength=84)[c == LABELS]
        expected = tolerance(1 / count, times.sum()) * times.sum()
        assert np.abs(times - times.sum() / count).max() < expected


def test_a_slot_does_not_depend_on_the_batch_size():
    large = sampler("square_root", batch_size=16).batch(5)
    assert sampler("square_root", batch_size=6).batch(5) == large[:6]


def test_probability_zero_is_never_drawn():
    never = np.array([0.0, 1.0, 0.0])
    source = ClassDraws(LABELS, 500, first=never, last=never, iterations=1, seed=1, member=0)
    assert set(LABELS[source.batch(0)]) == {1}
