"""Which images iteration t trains on, when classes are not drawn as often as they occur.

Every batch is a pure function of (seed, member, t): nothing is consumed, so a run resumes at any
iteration and members do not depend on each other. Strategies after Kang et al. (arXiv 1910.09217,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ssod_imwa.classification.checks import check_at_least_1, check_choice
from ssod_imwa.classification.data.imbalance import (
    Labels,
    check_no_class_is_empty,
    positions_by_class,
)
from ssod_imwa.classification.data.subsets import SubsetOptions, member_positions
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.order import BatchStream, IndexStream, Order
from ssod_imwa.engine.seeding import counted_generator


@dataclass(frozen=True)
class ClassSamplerOptions(Options):
    """Of the samplers that draw classes equally, always or in every other batch."""

    per_draw: int = option(1, "images in a row of one class; cRT, MiSLAS and BTM have 4", low=1)


@dataclass(frozen=True)
class Source:
    """What a sampler draws from, for one member and stream.

    Attributes:
        labels: int (N,), 0..C-1.
        classes: C; each needs an image.
        batch_size: B, images of the global batch.
        iterations: T of the member.
        counts: what else the order is a function of: `seed`, `member`, and `kind`, the stream.
    """

    labels: Labels
    classes: int
    batch_size: int
    iterations: int
    counts: dict[str, Any]


class Sampler(NamedTuple):
    """A way of drawing images: what makes the order of a member, and its options."""

    make: Callable[[Source, Any], Order]
    options_class: type[Options] = Options


def stream_counts(kind: str) -> tuple[str, ...]:
    """What a stream's name adds to seeds: nothing for "labeled", which once was the only stream."""
    return () if kind == "labeled" else (kind,)


def class_sampler(
    name: str,
    labels: Labels,
    classes: int,
    batch_size: int,
    *,
    seed: int,
    member: int,
    kind: str = "labeled",
    iterations: int,
    options: Options | None = None,
) -> Order:
    """The sampler of a name.

    Args:
        name: "instance": shuffled passes over all images, each once per pass. "class": every class
            equally often, see `ClassAwareStream`. "square_root", "progressive", "reversed":
            independent draws, see `ClassDraws`. "alternating": a batch of "instance", then one of
            "class". "balanced_subset": shuffled passes over images that are the member's own, see
            `member_positions`.
        labels: int (N,), 0..C-1.
        classes: C; each needs an image.
        batch_size: B, images of the global batch.
        seed: run seed.
        member: number of the member that reads.
        kind: name of the stream; samplers of different streams are independent.
        iterations: T of the member, over which "progressive" turns from instance to class balance.
        options: of the sampler; None for the defaults.

    Raises:
        DataError: a class has no images.
        ValueError: the name is not known or a number is out of range.

    Example:
        >>> sampler = class_sampler(
        ...     "class", [0, 0, 0, 0, 1, 1], 2, 4, seed=1, member=0, iterations=10
        ... )
        >>> sum(position < 4 for position in sampler.batch(7))
        2
    """
    check_choice("sampler", name, SAMPLERS)
    sampler = SAMPLERS[name]
    counts = {"seed": seed, "member": member, "kind": kind}
    source = Source(labels, classes, batch_size, iterations, counts)
    return sampler.make(source, sampler.options_class() if options is None else options)


def power_probabilities(counts: Sequence[int], power: float) -> np.ndarray:
    """Probability of each class, n_c^q / sum of n_j^q (Kang et al., Eq. 1), float64 (C,).

    Args:
        counts: images of each class (n_c), at least 1.
        power: q: 1 draws classes as often as they occur, 0 equally, 1/2 by the square root, -1 in
            reverse (BBN, arXiv 1912.02413).

    Raises:
        DataError: a class has no images.

    Example:
        >>> power_probabilities([9, 1], 0.5).tolist()
        [0.75, 0.25]
    """
    check_no_class_is_empty(counts)
    weights = np.asarray(counts, dtype=np.float64) ** power
    return weights / weights.sum()


def mixed_probabilities(
    first: np.ndarray, last: np.ndarray, *, t: int, iterations: int
) -> np.ndarray:
    """(1 - t/T) first + (t/T) last (Kang et al., Eq. 2, by the iteration instead of the epoch).

    Args:
        first: probabilities at t = 0.
        last: probabilities at t = T and later.
        t: own iteration of the member, at least 0.
        iterations: T, at least 1.

    Example:
        >>> mixed_probabilities(np.array([0.9, 0.1]), np.array([0.5, 0.5]), t=3, iterations=4)
        array([0.6, 0.4])
    """
    progress = min(1.0, t / iterations)
    return (1 - progress) * first + progress * last


class ClassDraws(Order):
    """Independent draws: a class by probabilities that may change with t, then an image of it.

    Images of a class are equally likely and may repeat within a batch, as in a weighted random
    sampler. Slot b of batch t uses the b-th pair of numbers of the generator counted by (seed,
    member, t).

    Args:
        labels: int (N,), 0..C-1.
        batch_size: B, at least 1.
        first: float64 (C,), probability of each class at t = 0; their number is C.
        last: the same at t = T; see `mixed_probabilities`.
        iterations: T, at least 1.
        seed: run seed.
        member: number of the member that reads.
        kind: name of the stream.

    Raises:
        DataError: a class has no images.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int,
        *,
        first: np.ndarray,
        last: np.ndarray,
        iterations: int,
        seed: int,
        member: int,
        kind: str = "labeled",
    ) -> None:
        check_at_least_1(batch_size=batch_size, iterations=iterations)
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.iterations = iterations
        groups = positions_by_class(labels, len(first))
        self._counts = np.array([len(group) for group in groups])
        check_no_class_is_empty(self._counts)
        self._positions = np.concatenate(groups)
        self._begins = np.cumsum(self._counts) - self._counts
        self._source: tuple[int | str, ...] = (seed, "class draws", *stream_counts(kind), member)

    def batch(self, t: int) -> list[int]:
        """Positions in the data set of batch t."""
        drawn, offsets = self._draw(t)
        return self._positions[self._begins[drawn] + offsets].tolist()

    def successor(self, t: int, slot: int, steps: int) -> int:
        """The image `steps` places after the slot's in the list of its class, which is a circle."""
        drawn, offsets = self._draw(t)
        c = drawn[slot]
        return int(self._positions[self._begins[c] + (offsets[slot] + steps) % self._counts[c]])

    def _draw(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Class of each slot, and the number of its image within the class."""
        _check_iteration(t)
        numbers = counted_generator(*self._source, t).random((self.batch_size, 2))
        share = mixed_probabilities(self.first, self.last, t=t, iterations=self.iterations)
        ends = np.cumsum(share)
        # Dividing makes the last end exactly 1, above every number drawn from [0, 1).
        drawn = np.searchsorted(ends / ends[-1], numbers[:, 0], side="right")
        return drawn, (numbers[:, 1] * self._counts[drawn]).astype(np.int64)


class ClassAwareStream(Order):
    """Passes over the classes in shuffled order, each class yielding from its own shuffled images.

    Slot b of batch t is position p = t*B + b of an endless stream. Its draw is d = p // k, which
    belongs to pass d // C, so that each class has had exactly d // C draws before: the image is
    number (d // C) * k + p % k of the class's own `IndexStream`. Every class comes equally often,
    and within a class no image comes twice before all came once. k = 4 is the setting of cRT.

    Args:
        labels: int (N,), 0..C-1.
        classes: C; each needs an image.
        batch_size: B, at least 1.
        seed: run seed.
        member: number of the member that reads.
        kind: name of the stream.
        per_draw: k, images in a row of one class, at least 1.

    Raises:
        DataError: a class has no images.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        labels: Labels,
        classes: int,
        batch_size: int,
        *,
        seed: int,
        member: int,
        kind: str = "labeled",
        per_draw: int = 1,
    ) -> None:
        check_at_least_1(batch_size=batch_size, per_draw=per_draw)
        self.batch_size = batch_size
        self.per_draw = per_draw
        self._groups = positions_by_class(labels, classes)
        check_no_class_is_empty([len(group) for group in self._groups])
        prefix = "".join(f"{name}/" for name in stream_counts(kind))
        self._classes = IndexStream(classes, seed=seed, member=member, kind=f"{prefix}classes")
        self._images = [
            IndexStream(len(group), seed=seed, member=member, kind=f"{prefix}class/{c}")
            for c, group in enumerate(self._groups)
        ]

    def batch(self, t: int) -> list[int]:
        """Positions in the data set of batch t."""
        _check_iteration(t)
        return [self.successor(t, slot, 0) for slot in range(self.batch_size)]

    def successor(self, t: int, slot: int, steps: int) -> int:
        """The image `steps` positions after the slot's in the stream of its class."""
        draw, within = divmod(t * self.batch_size + slot, self.per_draw)
        c = self._classes[draw]
        number = draw // len(self._groups) * self.per_draw + within
        return int(self._groups[c][self._images[c][number + steps]])


class Alternating(Order):
    """Batches of several orders by turns: batch t is number t // K of order t % K.

    One run then sees the mixture that members with a sampler each see together: the control of
    members that differ.

    Args:
        orders: K of them, at least one.
    """

    def __init__(self, *orders: Order) -> None:
        self._orders = orders

    def batch(self, t: int) -> list[int]:
        """Positions in the data set of batch t."""
        _check_iteration(t)
        number, turn = divmod(t, len(self._orders))
        return self._orders[turn].batch(number)

    def successor(self, t: int, slot: int, steps: int) -> int:
        """As the order says whose turn it is."""
        number, turn = divmod(t, len(self._orders))
        return self._orders[turn].successor(number, slot, steps)


def _instance(source: Source, options: Options) -> Order:
    return BatchStream([np.arange(len(source.labels))], source.batch_size, **source.counts)


def _class_aware(source: Source, options: ClassSamplerOptions) -> Order:
    images = (source.labels, source.classes, source.batch_size)
    return ClassAwareStream(*images, per_draw=options.per_draw, **source.counts)


def _alternating(source: Source, options: ClassSamplerOptions) -> Order:
    return Alternating(_instance(source, options), _class_aware(source, options))


def _by_powers(first: float, last: float) -> Callable[[Source, Options], Order]:
    """What draws classes by powers of their counts, from `first` at t = 0 to `last` at T."""

    def make(source: Source, options: Options) -> Order:
        images = [len(group) for group in positions_by_class(source.labels, source.classes)]
        return ClassDraws(
            source.labels,
            source.batch_size,
            first=power_probabilities(images, first),
            last=power_probabilities(images, last),
            iterations=source.iterations,
            **source.counts,
        )

    return make


def _subset(source: Source, options: SubsetOptions) -> Order:
    seed, member = source.counts["seed"], source.counts["member"]
    positions = member_positions(source.labels, source.classes, options, seed=seed, member=member)
    return BatchStream([positions], source.batch_size, **source.counts)


SUBSET = "balanced_subset"
SAMPLERS: dict[str, Sampler] = {
    "instance": Sampler(_instance),
    "class": Sampler(_class_aware, ClassSamplerOptions),
    "square_root": Sampler(_by_powers(0.5, 0.5)),
    "progressive": Sampler(_by_powers(1, 0)),
    "reversed": Sampler(_by_powers(-1, -1)),
    "alternating": Sampler(_alternating, ClassSamplerOptions),
    SUBSET: Sampler(_subset, SubsetOptions),
}


@dataclass(frozen=True)
class SamplerChoice(Options):
    """The sampler; the other keys of CLS.SAMPLER are its own."""

    name: str = option(
        "instance",
        "how often classes are drawn: as often as they occur, equally, ..., the two by turns, or "
        "from images of each class that are the member's own",
        choices=tuple(SAMPLERS),
    )


def _check_iteration(t: int) -> None:
    if t < 0:
        raise IndexError(f"t = {t} is not allowed (must be at least 0)")
