"""Which images a global step reads: a function of (seed, member, own iteration, slot).

Nothing is consumed and nothing is left in buckets, so a run can begin at any global step, members
can be trained in any order, and the order does not know how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.detection.data.records import ImageRecord
from ssod_imwa.engine.seeding import counted_generator

Kind = Literal["labeled", "unlabeled"]


def hashed(name: str) -> str:
    """The name of a stream as seeds hash it, spelled as in version 0.1: runs stay the same."""
    return name.replace("labeled", "labelled")


class SampleKey(NamedTuple):
    """One image of one batch; all of it but `index` also seeds the image's augmentation."""

    kind: Kind
    index: int
    """Position of the image in its data set."""
    member: int
    t: int
    slot: int
    """Place in the global batch, whatever rank reads it."""


class IndexStream:
    """An endless shuffled pass over 0..size-1 that can be read at any position.

    Position p holds `permutation(p // size)[p % size]`, where each epoch's permutation comes from a
    generator counted by (seed, kind, member, epoch). Reading onwards costs one permutation per
    epoch; so does a jump.

    Args:
        size: number of items, at least 1.
        seed: run seed.
        member: number of the member that reads.
        kind: what is read; streams of different kinds are independent.

    Example:
        >>> stream = IndexStream(3, seed=1, member=0, kind="labeled")
        >>> sorted(stream[p] for p in range(3, 6))
        [0, 1, 2]
    """

    def __init__(self, size: int, *, seed: int, member: int, kind: str) -> None:
        if size < 1:
            raise ValueError(f"size = {size} is not allowed (must be at least 1)")
        self.size = size
        self._counts = (seed, "order", hashed(kind), member)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise IndexError(f"position = {position} is not allowed (must be at least 0)")
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = counted_generator(*self._counts, epoch).permutation(self.size)
            self._epoch = epoch
        return int(self._order[offset])


class BatchStream:
    """Endless batches, each from one group only, in which every item comes equally often.

    With one group, batch t is positions t*B..t*B+B-1 of its `IndexStream`; batches run over the end
    of an epoch, so nothing is dropped and B may exceed the number of items.

    With two groups of n_0 and n_1 of the n items, each group has its own stream and

        s(t) = round(t * n_0 / n)

    is the number of batches among the first t that group 0 is due. Batches are dealt in rounds of
    K = ceil(n / B), about one epoch: round j gives group 0 exactly s((j+1)K) - s(jK) batches, at
    places shuffled by a generator counted by (seed, kind, member, j). If c(t) batches before t were
    of group 0, batch t is batch c(t) of group 0 or t - c(t) of group 1. At the end of every round a
    group is at most half a batch away from its share, whatever B is. A group smaller than B fills
    its batches with repetitions, since batches never mix groups.

    Args:
        groups: one or two non-empty integer arrays, item numbers without repetition.
        batch_size: B, images of the global batch.
        seed: run seed.
        member: number of the member that reads.
        kind: what is read.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], batch_size: int, *, seed: int, member: int, kind: str
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size} is not allowed (must be at least 1)")
        if len(groups) not in (1, 2):
            raise ValueError(f"{len(groups)} groups are not allowed (must be 1 or 2)")
        self.groups = groups
        self.batch_size = batch_size
        self._counts = (seed, "orientation", hashed(kind), member)
        self._streams = [
            IndexStream(len(group), seed=seed, member=member, kind=f"{kind}/{number}")
            for number, group in enumerate(groups)
        ]
        self._items = sum(len(group) for group in groups)
        self._round_length = -(-self._items // batch_size)
        self._round = -1
        self._first_group = np.empty(0, dtype=bool)

    def batch(self, t: int) -> list[int]:
        """Items of the member's batch t."""
        group, first = self._place(t)
        return [self._item(group, first + slot) for slot in range(self.batch_size)]

    def successor(self, t: int, slot: int, steps: int) -> int:
        """The item that stands `steps` positions after this slot in the slot's own stream."""
        group, first = self._place(t)
        return self._item(group, first + slot + steps)

    def _item(self, group: int, position: int) -> int:
        return int(self.groups[group][self._streams[group][position]])

    def _place(self, t: int) -> tuple[int, int]:
        """Group of batch t and the position in the group's stream at which the batch begins."""
        if t < 0:
            raise IndexError(f"t = {t} is not allowed (must be at least 0)")
        if len(self.groups) == 1:
            return 0, t * self.batch_size
        number, offset = divmod(t, self._round_length)
        before = self._share(number * self._round_length)
        self._deal(number)
        before += int(self._first_group[:offset].sum())
        if self._first_group[offset]:
            return 0, before * self.batch_size
        return 1, (t - before) * self.batch_size

    def _share(self, t: int) -> int:
        """s(t) in integers, so that it stays exact over any number of batches."""
        return (2 * t * len(self.groups[0]) + self._items) // (2 * self._items)

    def _deal(self, number: int) -> None:
        if number == self._round:
            return
        first = number * self._round_length
        due = self._share(first + self._round_length) - self._share(first)
        places = np.arange(self._round_length) < due
        self._first_group = counted_generator(*self._counts, number).permutation(places)
        self._round = number


class DataOrder:
    """The batches of every member for one kind of data.

    Args:
        records: the data set, of which only widths and heights are used.
        batch_size: images of the global batch, over all ranks.
        kind: "labeled" or "unlabeled".
        seed: run seed.
        aspect_ratio_grouping: keep wide (w > h) and other images in different batches, which saves
            padding.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        batch_size: int,
        *,
        kind: Kind,
        seed: int,
        aspect_ratio_grouping: bool,
    ) -> None:
        if not len(records):
            raise ValueError(f"no {kind} images (at least one is needed)")
        self.kind = kind
        self.batch_size = batch_size
        self._seed = seed
        self._groups = (
            orientation_groups(records) if aspect_ratio_grouping else [np.arange(len(records))]
        )
        self._members: dict[int, BatchStream] = {}

    def member(self, member: int) -> BatchStream:
        """The stream of one member."""
        if member not in self._members:
            self._members[member] = BatchStream(
                self._groups, self.batch_size, seed=self._seed, member=member, kind=self.kind
            )
        return self._members[member]

    def keys(self, member: int, t: int) -> list[SampleKey]:
        """The member's global batch t."""
        batch = self.member(member).batch(t)
        return [SampleKey(self.kind, index, member, t, slot) for slot, index in enumerate(batch)]

    def replacement(self, key: SampleKey, steps: int) -> SampleKey:
        """The same slot, filled by what comes `steps` positions later in the member's stream.

        The image has the same orientation; later slots and steps keep the images they had.
        """
        index = self.member(key.member).successor(key.t, key.slot, steps)
        return key._replace(index=index)


def orientation_groups(records: Sequence[ImageRecord]) -> list[np.ndarray]:
    """Positions of wide (w > h) and of other images, without empty groups."""
    wide = np.array([record.width > record.height for record in records], dtype=bool)
    return [group for group in (np.flatnonzero(wide), np.flatnonzero(~wide)) if len(group)]


class ScheduleSampler(Sampler[list[SampleKey]]):
    """The samples of each global step, for a data loader without automatic batching.

    Args:
        schedule: which member takes which of its iterations at a global step.
        orders: one order for each kind of data; a step's samples come in this sequence.
        first_member: number of the schedule's member 0.
        start: first global step, 0..len(schedule).
        rank: this process; it reads slots rank, rank + world_size, ... of each global batch.
        world_size: number of processes.

    Raises:
        ValueError: `start` or `rank` is out of range, or a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        schedule: EpisodeSchedule,
        orders: Sequence[DataOrder],
        *,
        first_member: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= start <= len(schedule):
            raise ValueError(f"start = {start} is not allowed (must be 0..{len(schedule)})")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is not allowed (must be 0..{world_size - 1})")
        for order in orders:
            if order.batch_size % world_size:
                raise ValueError(
                    f"{order.kind} batch of {order.batch_size} is not allowed on {world_size} "
                    "processes (must be a multiple)"
                )
        self.schedule = schedule
        self.orders = orders
        self.first_member = first_member
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.schedule) - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for global_step in range(self.start, len(self.schedule)):
            position = self.schedule.position(global_step)
            member = self.first_member + position.member
            yield [
                key
                for order in self.orders
                for key in order.keys(member, position.t)[self.rank :: self.world_size]
            ]
