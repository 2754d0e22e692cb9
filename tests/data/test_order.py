from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.data.order import (
    BatchStream,
    DataOrder,
    IndexStream,
    SampleKey,
    ScheduleSampler,
    orientation_groups,
)
from ssod_imwa.detection.data.records import ImageRecord


def records(wide, tall):
    shapes = [(4, 3), (3, 4)]
    kinds = [0] * wide + [1] * tall
    np.random.default_rng(0).shuffle(kinds)
    return [ImageRecord(f"{i}.png", i, *shapes[kind]) for i, kind in enumerate(kinds)]


def order(wide=5, tall=3, batch_size=4, kind="labeled", seed=1, grouping=True):
    return DataOrder(
        records(wide, tall), batch_size, kind=kind, seed=seed, aspect_ratio_grouping=grouping
    )


def stream(groups, batch_size, member=0, seed=1):
    return BatchStream(groups, batch_size, seed=seed, member=member, kind="labeled")


# -------------------------------------------------------------------------------- index stream


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_of_an_index_stream_is_a_permutation(size):
    numbers = IndexStream(size, seed=3, member=1, kind="labeled")
    for epoch in range(5):
        part = [numbers[epoch * size + i] for i in range(size)]
        assert sorted(part) == list(range(size))


def test_epochs_differ():
    numbers = IndexStream(50, seed=3, member=1, kind="labeled")
    epochs = [tuple(numbers[epoch * 50 + i] for i in range(50)) for epoch in range(4)]
    assert len(set(epochs)) == 4


def test_position_does_not_depend_on_what_was_read_before():
    read_through = IndexStream(7, seed=3, member=1, kind="labeled")
    expected = [read_through[p] for p in range(60)]
    jumping = IndexStream(7, seed=3, member=1, kind="labeled")
    for p in np.random.default_rng(0).permutation(60):
        assert jumping[int(p)] == expected[p]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2, "member": 0, "kind": "labeled"},
        {"seed": 1, "member": 1, "kind": "labeled"},
        {"seed": 1, "member": 0, "kind": "unlabeled"},
    ],
)
def test_seed_member_and_kind_each_change_the_stream(other):
    one = IndexStream(100, seed=1, member=0, kind="labeled")
    same = IndexStream(100, seed=1, member=0, kind="labeled")
    two = IndexStream(100, **other)
    assert [one[p] for p in range(100)] == [same[p] for p in range(100)]
    # Independent permutations agree in about one place, whatever their length.
    assert sum(one[p] == two[p] for p in range(100)) < 10


@pytest.mark.parametrize(("size", "position"), [(0, 0), (3, -1)])
def test_index_stream_refuses_what_has_no_meaning(size, position):
    with pytest.raises((ValueError, IndexError), match="not allowed"):
        IndexStream(size, seed=1, member=0, kind="labeled")[position]


# ------------------------------------------------------------------------------- batch stream


def counted_batches(wide, tall, batch_size, steps):
    """Batches by walking: a pointer per group, and the formula of the docstring in fractions."""
    from fractions import Fraction
    from math import ceil, floor

    from ssod_imwa.engine.seeding import counted_generator

    n = wide + tall
    lists = [list(range(wide)), list(range(wide, n))]
    endless = []
    for number, items in enumerate(lists):
        numbers = []
        for epoch in range(ceil(steps * batch_size / len(items)) + 1):
            generator = counted_generator(1, "order", f"labelled/{number}", 0, epoch)
            numbers += [items[i] for i in generator.permutation(len(items))]
        endless.append(iter(numbers))
    length = ceil(Fraction(n, batch_size))
    due, batches = 0, []
    for number in range(ceil(Fraction(steps, length))):
        target = floor(Fraction((number + 1) * length * wide, n) + Fraction(1, 2))
        places = [i < target - due for i in range(length)]
        due = target
        for first in counted_generator(1, "orientation", "labelled", 0, number).permutation(places):
            batches.append([next(endless[0 if first else 1]) for _ in range(batch_size)])
    return batches[:steps]


@pytest.mark.parametrize(
    ("wide", "tall", "batch_size"), [(5, 3, 4), (30, 7, 4), (2, 1, 8), (64, 1, 3), (10, 10, 1)]
)
def test_batches_equal_those_of_a_walk_with_pointers(wide, tall, batch_size):
    groups = [np.arange(wide), np.arange(wide, wide + tall)]
    expected = counted_batches(wide, tall, batch_size, steps=50)
    batches = stream(groups, batch_size)
    assert [batches.batch(t) for t in range(50)] == expected
    jumping = stream(groups, batch_size)
    for t in np.random.default_rng(0).permutation(50):
        assert jumping.batch(int(t)) == expected[t]


@pytest.mark.parametrize(("wide", "tall"), [(5, 3), (3, 5), (40, 2), (1, 1), (7, 0)])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_image_comes_equally_often(wide, tall, batch_size):
    groups = [np.arange(wide), np.arange(wide, wide + tall)]
    batches = stream([group for group in groups if len(group)], batch_size)
    n = wide + tall
    rounds = 60
    steps = rounds * -(-n // batch_size)
    counts = Counter(index for t in range(steps) for index in batches.batch(t))
    mean = steps * batch_size / n
    for index in range(n):
        group_size = wide if index < wide else tall
        # Half a batch shared by the group, and one for the epoch under way.
        assert abs(counts[index] - mean) <= batch_size / 2 / group_size + 1


def test_batches_never_mix_groups_and_both_groups_come_in_every_round():
    groups = [np.arange(30), np.arange(30, 50)]
    batches = stream(groups, 5)
    wide = []
    for t in range(200):
        kinds = {index < 30 for index in batches.batch(t)}
        assert len(kinds) == 1
        wide.append(kinds.pop())
    assert [sum(wide[i : i + 10]) for i in range(0, 200, 10)] == [6] * 20
    rounds = {tuple(wide[i : i + 10]) for i in range(0, 200, 10)}
    assert len(rounds) > 10, "the places of the wide batches are shuffled"


def test_one_group_reads_its_stream_in_order_across_epochs():
    numbers = IndexStream(5, seed=1, member=0, kind="labeled/0")
    batches = stream([np.arange(5)], 3)
    read = [index for t in range(20) for index in batches.batch(t)]
    assert read == [numbers[p] for p in range(60)]


def test_batch_larger_than_the_data_set_wraps():
    assert sorted(stream([np.arange(3)], 9).batch(4)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_members_read_different_batches():
    groups = [np.arange(100), np.arange(100, 150)]
    one, two = (stream(groups, 10, member=member) for member in (0, 1))
    assert all(one.batch(t) != two.batch(t) for t in range(30))


@pytest.mark.parametrize(
    ("groups", "batch_size"), [([np.arange(3)], 0), ([], 2), ([np.arange(2)] * 3, 2)]
)
def test_batch_stream_refuses_what_has_no_meaning(groups, batch_size):
    with pytest.raises(ValueError, match="not allowed"):
        stream(groups, batch_size)


# -------------------------------------------------------------------------------- data order


def test_groups_are_wide_and_other():
    shapes = [(4, 3), (3, 4), (3, 3), (9, 1)]
    items = [ImageRecord("", i, *shape) for i, shape in enumerate(shapes)]
    assert [group.tolist() for group in orientation_groups(items)] == [[0, 3], [1, 2]]
    assert [group.tolist() for group in orientation_groups(items[1:3])] == [[0, 1]]


def test_without_grouping_orientations_mix():
    items = records(20, 20)
    mixed = order(20, 20, 8, grouping=False)
    kinds = [
        {items[key.index].width > items[key.index].height for key in mixed.keys(0, t)}
        for t in range(20)
    ]
    assert {True, False} in kinds


def test_replacement_is_what_follows_in_the_same_stream():
    items = records(6, 4)
    data = order(6, 4, 2)
    batches = data.member(3)
    for t in range(20):
        for key in data.keys(3, t):
            first = key._replace(index=batches.successor(t, key.slot, 0))
            assert first == key
            following = data.replacement(key, 1)
            assert following._replace(index=key.index) == key
            group = items[key.index].width > items[key.index].height
            assert group == (items[following.index].width > items[following.index].height)
            if key.slot == 0:
                assert following.index == data.keys(3, t)[1].index


# ---------------------------------------------------------------------------- schedule sampler


def sampler(schedule, **settings):
    orders = [order(5, 3, 4), order(9, 2, 6, kind="unlabeled")]
    return ScheduleSampler(schedule, orders, **settings)


def test_steps_follow_the_schedule():
    schedule = EpisodeSchedule(6, episodes=3, members=2)
    steps = list(sampler(schedule, first_member=5))
    assert len(steps) == len(schedule) == 12
    for global_step, keys in enumerate(steps):
        position = schedule.position(global_step)
        assert [key.kind for key in keys] == ["labeled"] * 4 + ["unlabeled"] * 6
        assert [key.slot for key in keys] == [*range(4), *range(6)]
        assert {(key.member, key.t) for key in keys} == {(5 + position.member, position.t)}
        assert keys[:4] == order(5, 3, 4).keys(5 + position.member, position.t)


def test_any_start_continues_the_same_steps():
    schedule = EpisodeSchedule(6, episodes=2, members=2)
    whole = list(sampler(schedule))
    for start in range(len(schedule) + 1):
        part = sampler(schedule, start=start)
        assert len(part) == len(schedule) - start
        assert list(part) == whole[start:]


def test_members_do_not_depend_on_the_number_of_episodes():
    def by_member(episodes):
        schedule = EpisodeSchedule(12, episodes=episodes, members=2)
        return {(keys[0].member, keys[0].t): keys for keys in sampler(schedule)}

    assert by_member(1) == by_member(4) == by_member(12)


def test_a_member_as_a_run_of_its_own_reads_the_same():
    both = list(sampler(EpisodeSchedule(6, members=2)))
    alone = list(sampler(EpisodeSchedule(6), first_member=1))
    assert alone == both[6:]


def test_ranks_share_out_the_global_batch():
    schedule = EpisodeSchedule(8, episodes=2, members=2)
    whole = list(sampler(schedule))
    ranks = [list(sampler(schedule, rank=rank, world_size=2)) for rank in range(2)]
    for step, *parts in zip(whole, *ranks, strict=True):
        assert len(parts[0]) == len(parts[1]) == 5
        assert sorted(parts[0] + parts[1]) == sorted(step)


def test_labeled_and_unlabeled_orders_are_independent():
    one, two = order(20, 0, 20), order(20, 0, 20, kind="unlabeled")
    for t in range(5):
        assert [k.index for k in one.keys(0, t)] != [k.index for k in two.keys(0, t)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": -1}, "start = -1"),
        ({"start": 7}, "must be 0..6"),
        ({"rank": 2, "world_size": 2}, "rank = 2"),
        ({"world_size": 4}, "unlabeled batch of 6 is not allowed on 4"),
    ],
)
def test_sampler_names_what_is_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        sampler(EpisodeSchedule(6), **settings)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="no labeled images"):
        order(0, 0)


def test_a_step_far_into_a_large_run_costs_no_walk():
    """COCO after 180,000 iterations: two permutations of each kind, not 2.9 million reads."""
    items = records(100, 80)
    schedule = EpisodeSchedule(180_000, episodes=20, members=2)
    data = DataOrder(items, 16, kind="labeled", seed=1, aspect_ratio_grouping=True)
    draws = Counter()
    original = IndexStream.__getitem__

    def counted(self, position):
        draws["reads"] += 1
        return original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IndexStream, "__getitem__", counted)
        keys = next(iter(ScheduleSampler(schedule, [data], start=359_999)))
    assert all(isinstance(key, SampleKey) for key in keys)
    assert draws["reads"] == 16
    assert all(a.slot < b.slot for a, b in pairwise(keys))
