"""What a stream declares, and the batches that are made of several, with toy images."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import build_test_batches, build_train_batches
from ssod_imwa.data.order import BatchStream
from ssod_imwa.data.streams import (
    FileImages,
    MemoryImages,
    On,
    Stream,
    make_views,
    select_views,
)
from ssod_imwa.errors import DataError

SCHEDULE = EpisodeSchedule(4, episodes=2, members=2)
VIEWS = {"weak": 10, "strong": On("weak", 100)}


def seeds(step, slot):
    return [-1 if step.seed is None else step.seed, step.member, step.t, slot]


class Files(FileImages):
    """Image i is a row of one number; a view is that times a factor, and what may seed it."""

    def __init__(self, count=7, broken=(), name="files"):
        self.name = name
        self.count = count
        self.broken = broken

    def __len__(self):
        return self.count

    def shared(self):
        return self

    def make(self, index, slot, step, views):
        if index in self.broken:
            raise DataError(f"image {index} of {self.name} cannot be read")
        made = make_views(views, index, lambda number, factor, image: factor * image)
        return {name: torch.tensor([x, *seeds(step, slot)]) for name, x in made.items()}

    def join(self, samples, indices):
        views = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return Part(views, None, indices)


class Memory(MemoryImages):
    """The same, a batch at a time."""

    name = "memory"

    def __init__(self, count=9):
        self.count = count

    def __len__(self):
        return self.count

    def make(self, step, views):
        indices = torch.tensor(step.positions)
        made = make_views(views, indices, lambda number, factor, images: factor * images)
        rows = torch.tensor([seeds(step, slot) for slot in step.slots])
        parts = {name: torch.cat([x[:, None], rows], 1) for name, x in made.items()}
        return Part(parts, 2 * indices, indices)


def stream(dataset, name="labeled", batch_size=4, views=VIEWS):
    order = partial(BatchStream, [np.arange(len(dataset))])
    return Stream(name, dataset, order, batch_size=batch_size, views=views)


def build(*streams, schedule=SCHEDULE, **settings):
    streams = streams or (stream(Files()), stream(Memory(), "unlabeled", 6, {"image": 1}))
    return build_train_batches(streams, schedule, **{"seed": 1, **settings})


def flat(batches):
    return [
        {
            name: (
                {view: values.tolist() for view, values in part.views.items()},
                None if part.targets is None else part.targets.tolist(),
                part.indices.tolist(),
            )
            for name, part in batch.items()
        }
        for batch in batches
    ]


# ----------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ({}, "no views are not allowed"),
        ({"strong": On("weak", 1), "weak": 1}, "view 'strong' on 'weak' is not allowed"),
        ({"weak": On("weak", 1)}, "view 'weak' on 'weak' is not allowed"),
    ],
)
def test_views_that_cannot_be_made_are_refused(views, words):
    with pytest.raises(ValueError, match=words):
        stream(Files(), views=views)


def test_streams_without_images_are_refused():
    with pytest.raises(DataError, match="files has no images"):
        stream(Files(0))
    with pytest.raises(ValueError, match="batch_size = 0 is not allowed"):
        stream(Files(), batch_size=0)


def test_views_are_made_in_order_from_the_stored_image_or_another_view():
    views = {"a": 2, "b": On("a", 3), "c": 5, "d": On("b", 7)}
    calls = []

    def transform(number, factor, image):
        calls.append((number, factor, image))
        return factor * image

    assert make_views(views, 1, transform) == {"a": 2, "b": 6, "c": 5, "d": 42}
    assert calls == [(0, 2, 1), (1, 3, 2), (2, 5, 1), (3, 7, 6)]


def test_chosen_views_come_with_what_they_stand_on():
    views = {"a": 2, "b": On("a", 3), "c": 5, "d": On("b", 7)}
    assert list(select_views(views, ["d"])) == ["a", "b", "d"]
    assert list(select_views(views, ["c", "b"])) == ["a", "b", "c"]
    assert select_views(views, ["c"]) == {"c": 5}
    with pytest.raises(ValueError, match=r"view 'e' is not allowed \(must be one of \['a', "):
        select_views(views, ["a", "e"])


# ------------------------------------------------------------------------------- training batches


def test_batches_are_what_orders_and_counts_give():
    batches = list(build(first_member=5)(0))
    assert len(batches) == len(SCHEDULE)
    orders = {
        (name, member): BatchStream([np.arange(n)], b, seed=1, member=member, kind=name)
        for name, n, b in (("labeled", 7, 4), ("unlabeled", 9, 6))
        for member in (5, 6)
    }
    for g, batch in enumerate(batches):
        position = SCHEDULE.position(g)
        member, t = 5 + position.member, position.t
        assert list(batch) == ["labeled", "unlabeled"]
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        expected = orders["labeled", member].batch(t)
        rows = [[1, member, t, slot] for slot in range(4)]
        assert labeled.indices.tolist() == expected
        for name, factor in (("weak", 10), ("strong", 1000)):
            assert labeled.views[name][:, 0].tolist() == [factor * i for i in expected]
            assert labeled.views[name][:, 1:].tolist() == rows
        expected = orders["unlabeled", member].batch(t)
        assert unlabeled.views["image"][:, 0].tolist() == expected
        assert unlabeled.views["image"][:, 4].tolist() == list(range(6))
        assert unlabeled.targets.tolist() == [2 * i for i in expected]


def test_any_start_continues_the_same_batches():
    batches = build()
    whole = flat(batches(0))
    for start in range(len(SCHEDULE) + 1):
        assert flat(batches(start)) == whole[start:]


def test_members_do_not_depend_on_the_number_of_episodes():
    def by_member(episodes):
        schedule = EpisodeSchedule(12, episodes=episodes, members=2)
        positions = map(schedule.position, range(len(schedule)))
        batches = flat(build(schedule=schedule)(0))
        return {(p.member, p.t): batch for p, batch in zip(positions, batches, strict=True)}

    assert by_member(1) == by_member(4) == by_member(12)


def test_a_member_as_a_run_of_its_own_reads_the_same():
    both = flat(build(schedule=EpisodeSchedule(6, members=2))(0))
    alone = flat(build(schedule=EpisodeSchedule(6), first_member=1)(0))
    assert alone == both[6:]


def test_ranks_share_out_the_global_batch():
    whole = list(build()(0))
    for rank in range(2):
        expected = flat([batch.split(2)[rank] for batch in whole])
        assert flat(build(processes=Group(rank, 2))(0)) == expected


def test_a_stream_does_not_depend_on_others():
    together = flat(build()(0))
    alone = flat(build(stream(Memory(), "unlabeled", 6, {"image": 1}))(0))
    assert [batch["unlabeled"] for batch in together] == [batch["unlabeled"] for batch in alone]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_batches_do_not_depend_on_the_number_of_processes():
    images = Files(broken=[2])
    streams = stream(images), stream(Memory(), "unlabeled"), stream(images, "other", 2)
    settings = {"schedule": EpisodeSchedule(9), "on_bad_record": "skip"}
    here = flat(build(*streams, **settings)(0))
    batches = build(*streams, num_workers=3, **settings)
    assert flat(batches(0)) == here
    assert flat(batches(4)) == here[4:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"processes": Group(0, 4)}, "unlabeled batch of 6 is not allowed on 4 processes"),
        ({"on_bad_record": "warn"}, "on_bad_record = 'warn' is not allowed"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        build(**settings)


@pytest.mark.parametrize("start", [-1, 9])
def test_a_start_outside_the_run_is_refused_at_once(start):
    with pytest.raises(ValueError, match=rf"start = {start} is not allowed \(must be 0..8\)"):
        build()(start)


# ------------------------------------------------------------------------------- unreadable images


def test_an_unreadable_image_stops_the_run():
    with pytest.raises(DataError, match="image 3 of files cannot be read"):
        list(build(stream(Files(broken=[3])))(0))


def test_skip_puts_the_successor_in_the_slot_with_the_slots_own_seeds(caplog):
    expected = flat(build(stream(Files()))(0))
    batches = build(stream(Files(broken=[3, 5])), on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        result = flat(batches(0))
        list(batches(2))
    orders = [
        BatchStream([np.arange(7)], 4, seed=1, member=member, kind="labeled") for member in range(2)
    ]
    replaced = 0
    for g, (before, after) in enumerate(zip(expected, result, strict=True)):
        position = SCHEDULE.position(g)
        for slot, index in enumerate(before["labeled"][2]):
            if index in (3, 5):
                replaced += 1
                steps = (
                    orders[position.member].successor(position.t, slot, i) for i in range(1, 9)
                )
                index = next(i for i in steps if i not in (3, 5))
            assert after["labeled"][2][slot] == index
            row = after["labeled"][0]["weak"][slot]
            assert row == [10 * index, 1, position.member, position.t, slot]
    assert replaced > 5
    messages = [record.getMessage() for record in caplog.records]
    # The others of the kind are counted: one line for each power of ten.
    assert [message[:26] for message in messages] == ["image 3 of files cannot be"]


def test_skip_gives_up_when_nothing_can_be_read():
    batches = build(stream(Files(broken=range(7))), on_bad_record="skip")
    with pytest.raises(DataError, match="10 labeled images in a row cannot be read"):
        next(batches(0))


# ------------------------------------------------------------------------------------ test batches


@pytest.mark.parametrize("dataset", [Files(7), Memory(7)])
def test_test_batches_give_every_image_once_in_order(dataset):
    batches = build_test_batches(dataset, 3, batch_size=3)
    assert len(batches) == 3
    parts = list(batches)
    assert [part.indices.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert parts[1].views["image"][:, :2].tolist() == [[9, -1], [12, -1], [15, -1]]
    assert [part.indices.tolist() for part in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("dataset", [Files(7), Memory(7)])
def test_ranks_share_out_test_images(dataset):
    found = [
        [
            part.indices.tolist()
            for part in build_test_batches(dataset, 1, Group(rank, 3), batch_size=2)
        ]
        for rank in range(3)
    ]
    assert found == [[[0, 3], [6]], [[1, 4]], [[2, 5]]]


def test_an_unreadable_test_image_is_an_error():
    with pytest.raises(DataError, match="image 2 of files"):
        list(build_test_batches(Files(broken=[2]), 1, batch_size=2))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_unreadable_images_are_left_out_of_plain_batches_where_they_may_be(caplog, num_workers):
    files = Files(7, broken=[2, 3, 4])
    settings = {"batch_size": 2, "on_bad_record": "skip", "num_workers": num_workers}
    batches = build_test_batches(files, 3, **settings)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # [2, 3] has no image left
            parts = list(batches)
            assert [part.indices.tolist() for part in parts] == [[0, 1], [5], [6]]
    assert parts[1].views["image"][:, :2].tolist() == [[15, -1]]
    assert sorted(caplog.messages) == [
        f"image {i} of files cannot be read; it is left out" for i in (2, 3, 4)
    ]


def test_plain_batches_without_any_readable_image_are_an_error():
    batches = build_test_batches(Files(3, broken=range(3)), 1, batch_size=2, on_bad_record="skip")
    with pytest.raises(DataError, match="no image of files can be read"):
        list(batches)


def test_test_settings_that_have_no_meaning_are_refused():
    with pytest.raises(ValueError, match="on_bad_record = 'warn' is not allowed"):
        build_test_batches(Files(), 1, batch_size=1, on_bad_record="warn")
    with pytest.raises(ValueError, match="batch_size = 0 is not allowed"):
        build_test_batches(Files(), 1, batch_size=0)
