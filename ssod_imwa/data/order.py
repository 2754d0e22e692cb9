"""Which images a global step reads: a function of (seed, stream, member, own iteration, slot).

Nothing is consumed and nothing is left in buckets, so a run can begin at any global step, members
can be trained in any order, and the order does not know how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ssod_imwa.engine.seeding import counted_generator


def hashed(name: str) -> str:
    """The name of a stream as seeds hash it, spelled as in version 0.1: runs stay the same."""
    return name.replace("labeled", "labelled")


class Order(Protocol):
    """The endless batches of one member."""

    def batch(self, t: int) -> list[int]:
        """Positions in the data set of the member's batch t."""
        ...

    def slots(self, t: int, *, rank: int, size: int) -> Sequence[int]:
        """Places in batch t of process number `rank` of the `size` that share it."""
        return range(rank, len(self.batch(t)), size)

    def successor(self, t: int, slot: int, steps: int) -> int:
        """What may take a slot's place: the `steps`-th image after it that is like it.

        Later slots and batches keep the images that they have.
        """
        ...


class MakeOrder(Protocol):
    """Makes the order of a member, such as `partial(BatchStream, groups)`."""

    def __call__(self, batch_size: int, *, seed: int, member: int, kind: str) -> Order:
        """The order.

        Args:
            batch_size: images of the global batch, over all processes.
            seed: run seed.
            member: number of the member that reads.
            kind: name of the stream; orders of different streams are independent.
        """
        ...


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


class BatchStream(Order):
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
        """The item that stands `steps` positions after this slot in the slot's own group."""
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


@dataclass(frozen=True)
class Draw:
    """How many of the images of each draw are labeled: a function of (seed, member, t, draw).

    An iteration reads `count` draws of `size` images each, of two streams together. Every image of
    a draw is labeled with the probability `share`, independently; a draw without a labeled or
    without an unlabeled image then gets one. With 5 images and a share of 0.2 a draw has 1.33
    labeled ones in the mean.

    Attributes:
        count: draws of an iteration, over all processes.
        size: images of a draw, at least 2.
        share: probability of being labeled, between 0 and 1.
    """

    count: int
    size: int
    share: float

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 2 or not 0 < self.share < 1:
            raise ValueError(
                f"{self.count} draws of {self.size} images with a share of {self.share:g} are not "
                "allowed (must be at least 1, at least 2, and between 0 and 1)"
            )

    def labeled(self, number: int, *, seed: int, member: int) -> np.ndarray:
        """Labeled images of each draw in `DRAWN_AT_ONCE` iterations, int64 (iterations, count)."""
        generator = counted_generator(seed, "draws", member, number)
        drawn = generator.binomial(self.size, self.share, size=(DRAWN_AT_ONCE, self.count))
        return drawn.clip(1, self.size - 1)


# Iterations whose draws come from one generator: making one takes longer than what it draws.
DRAWN_AT_ONCE = 1024


class DrawnStream(BatchStream):
    """A `BatchStream` whose batch has as many images as the iteration's draws have of its kind.

    Batches go on where the group's last one ended, so every image comes equally often here, too.
    A process gets whole draws: number r of n has draws r, r + n, ...

    Args:
        groups: as for `BatchStream`.
        batch_size: images of a batch before draws are corrected, in the mean; groups take turns by
            it.
        draw: how many images each draw has; that of the other stream, too.
        labeled: whether this stream has the labeled images of a draw, or the others.
        seed: run seed.
        member: number of the member that reads.
        kind: what is read.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        *,
        draw: Draw,
        labeled: bool,
        seed: int,
        member: int,
        kind: str,
    ) -> None:
        super().__init__(groups, batch_size, seed=seed, member=member, kind=kind)
        self._draw, self._labeled = draw, labeled
        self._seed, self._member = seed, member
        self._blocks: dict[int, np.ndarray] = {}
        self._begins = [(0, 0)]  # positions in both groups at the begin of each round

    def batch(self, t: int) -> list[int]:
        """Items of the member's batch t."""
        group, first = self._place(t)
        return [self._item(group, first + slot) for slot in range(int(self._sizes(t, 1).sum()))]

    def slots(self, t: int, *, rank: int, size: int) -> Sequence[int]:
        """Places of the draws that are the process's."""
        (sizes,) = self._sizes(t, 1)
        ends = sizes.cumsum()
        draws = range(rank, self._draw.count, size)
        return [slot for k in draws for slot in range(ends[k] - sizes[k], ends[k])]

    def _sizes(self, t: int, iterations: int) -> np.ndarray:
        """Images of each draw in iterations t, t + 1, ..., int64 (iterations, draws)."""
        last = (t + iterations - 1) // DRAWN_AT_ONCE
        blocks = [self._block(number) for number in range(t // DRAWN_AT_ONCE, last + 1)]
        offset = t % DRAWN_AT_ONCE
        return np.concatenate(blocks)[offset : offset + iterations]

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            labeled = self._draw.labeled(number, seed=self._seed, member=self._member)
            self._blocks[number] = labeled if self._labeled else self._draw.size - labeled
        return self._blocks[number]

    def _place(self, t: int) -> tuple[int, int]:
        """Group of batch t and the position in the group's stream at which the batch begins."""
        if t < 0:
            raise IndexError(f"t = {t} is not allowed (must be at least 0)")
        number, offset = divmod(t, self._round_length)
        while len(self._begins) <= number:
            ended = len(self._begins) - 1
            self._begins.append(self._after(ended, self._round_length))
        begins = self._after(number, offset)
        group = int(not self._is_first(number)[offset])
        return group, begins[group]

    def _after(self, number: int, iterations: int) -> tuple[int, int]:
        """Positions in both groups after some iterations of a round."""
        first, second = self._begins[number]
        if not iterations:
            return first, second
        images = self._sizes(number * self._round_length, iterations).sum(axis=1)
        of_first = int(images[self._is_first(number)[:iterations]].sum())
        return first + of_first, second + int(images.sum()) - of_first

    def _is_first(self, number: int) -> np.ndarray:
        """Which batches of a round are of group 0."""
        if len(self.groups) == 1:
            return np.ones(self._round_length, dtype=bool)
        self._deal(number)
        return self._first_group
