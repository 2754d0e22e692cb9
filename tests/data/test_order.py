import math
from collections import Counter

import numpy as np
import pytest

from ssod_imwa.data.order import DRAWN_AT_ONCE, BatchStream, Draw, DrawnStream, IndexStream


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


def test_streams_of_different_names_are_independent():
    one, two = (
        BatchStream([np.arange(20)], 20, seed=1, member=0, kind=kind)
        for kind in ("labeled", "unlabeled")
    )
    assert all(one.batch(t) != two.batch(t) for t in range(5))


def test_successors_follow_in_the_same_group():
    groups = [np.arange(6), np.arange(6, 10)]
    batches = stream(groups, 2, member=3)
    for t in range(20):
        batch = batches.batch(t)
        for slot, index in enumerate(batch):
            assert batches.successor(t, slot, 0) == index
            following = [batches.successor(t, slot, steps) for steps in range(1, 5)]
            assert {following_index < 6 for following_index in following} == {index < 6}
        assert batches.successor(t, 0, 1) == batch[1]


def test_a_batch_far_into_a_large_run_costs_no_walk():
    """COCO after 180,000 iterations: two permutations, not 2.9 million reads."""
    draws = Counter()
    original = IndexStream.__getitem__

    def counted(self, position):
        draws["reads"] += 1
        return original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IndexStream, "__getitem__", counted)
        assert len(stream([np.arange(100), np.arange(100, 180)], 16).batch(179_999)) == 16
    assert draws["reads"] == 16


# ------------------------------------------------------------------------------ drawn batches

DRAW = Draw(count=4, size=5, share=0.2)


def drawn(groups, labeled, *, draw=DRAW, seed=1, member=0):
    return DrawnStream(
        groups,
        round(draw.count * draw.size * (draw.share if labeled else 1 - draw.share)),
        draw=draw,
        labeled=labeled,
        seed=seed,
        member=member,
        kind="labeled" if labeled else "unlabeled",
    )


def test_labeled_images_of_a_draw_are_binomial_with_at_least_one_of_each_kind():
    counts = np.concatenate([DRAW.labeled(n, seed=1, member=0).flatten() for n in range(10)])
    share = [math.comb(5, k) * 0.2**k * 0.8 ** (5 - k) for k in range(6)]
    expected = [share[0] + share[1], share[2], share[3], share[4] + share[5]]
    frequencies = [np.mean(counts == k) for k in range(1, 5)]
    assert frequencies == pytest.approx(expected, abs=0.01)
    assert counts.mean() == pytest.approx(1.33, abs=0.01)


@pytest.mark.parametrize("change", [{"seed": 2}, {"member": 1}])
def test_seed_and_member_each_change_the_draws(change):
    one = DRAW.labeled(0, seed=1, member=0)
    assert np.array_equal(one, DRAW.labeled(0, seed=1, member=0))
    assert not np.array_equal(one, DRAW.labeled(0, **{"seed": 1, "member": 0, **change}))
    assert not np.array_equal(one, DRAW.labeled(1, seed=1, member=0))


@pytest.mark.parametrize("groups", [[np.arange(30)], [np.arange(17), np.arange(17, 30)]])
def test_both_streams_share_out_each_draw(groups):
    labeled, unlabeled = drawn(groups, True), drawn(groups, False)
    lengths = set()
    for t in (*range(50), DRAWN_AT_ONCE - 1, DRAWN_AT_ONCE):
        sizes = DRAW.labeled(t // DRAWN_AT_ONCE, seed=1, member=0)[t % DRAWN_AT_ONCE]
        assert len(labeled.batch(t)) == sizes.sum()
        assert len(labeled.batch(t)) + len(unlabeled.batch(t)) == 20
        lengths.add(len(labeled.batch(t)))
    assert len(lengths) > 3


@pytest.mark.parametrize("labeled", [True, False])
def test_drawn_batches_do_not_depend_on_what_was_read_before(labeled):
    groups = [np.arange(17), np.arange(17, 30)]
    through = drawn(groups, labeled)
    expected = [through.batch(t) for t in range(80)]
    jumping = drawn(groups, labeled)
    for t in np.random.default_rng(0).permutation(80):
        assert jumping.batch(int(t)) == expected[t]


def test_drawn_batches_leave_nothing_out_and_keep_groups_apart():
    groups = [np.arange(17), np.arange(17, 30)]
    stream = drawn(groups, True)
    items = {0: [], 1: []}
    for t in range(400):
        batch = stream.batch(t)
        (group,) = {int(item >= 17) for item in batch}
        items[group] += batch
    for number, group in enumerate(groups):
        epochs = len(items[number]) // len(group)
        assert epochs > 10
        whole = Counter(items[number][: epochs * len(group)])
        assert whole == dict.fromkeys(group.tolist(), epochs)
    share = len(items[0]) / sum(map(len, items.values()))
    assert share == pytest.approx(17 / 30, abs=0.04)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_process_gets_whole_draws_and_each_slot_has_one_process(size):
    stream = drawn([np.arange(30)], True)
    for t in range(30):
        (sizes,) = DRAW.labeled(0, seed=1, member=0)[t : t + 1]
        shares = [list(stream.slots(t, rank=rank, size=size)) for rank in range(size)]
        assert [len(x) for x in shares] == [sizes[rank::size].sum() for rank in range(size)]
        assert sorted(slot for share in shares for slot in share) == list(
            range(len(stream.batch(t)))
        )


def test_what_takes_an_unreadable_images_place_is_of_its_group():
    groups = [np.arange(17), np.arange(17, 30)]
    stream = drawn(groups, True)
    for t in range(20):
        batch = stream.batch(t)
        others = [stream.successor(t, 0, steps) for steps in range(len(batch))]
        assert others == batch


@pytest.mark.parametrize("settings", [(0, 5, 0.2), (1, 1, 0.2), (1, 5, 0.0), (1, 5, 1.0)])
def test_draws_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="are not allowed"):
        Draw(*settings)
