"""Balanced subsets: which images are a member's own in Balanced Training and Merging (BTM)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.data.imbalance import (
    Labels,
    check_no_class_is_empty,
    positions_by_class,
)
from ssod_imwa.config.options import Options, option
from ssod_imwa.engine.seeding import counted_generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubsetOptions(Options):
    """Of balanced subsets (BTM)."""

    per_class: int = option(10, "N_C, images of each class in a member's subset", low=1)
    subsets: int = option(
        1,
        "subsets whose union is the member's; that of two is no longer balanced (BTM, section 3)",
        low=1,
    )


def balanced_subset(
    labels: Labels, classes: int, per_class: int, *, seed: int, number: int
) -> np.ndarray:
    """Positions of N_C random images of each class (BTM's subset D_number), int64 (n,).

    They come class after class, no image twice.

    A class with fewer images gives all it has, without repetition, as in BTM's experiments.

    Args:
        labels: int (N,), 0..C-1.
        classes: C; each needs an image.
        per_class: N_C, at least 1; BTM uses 10.
        seed: of the subsets.
        number: 0..N_D - 1; subsets of different numbers are drawn independently and may overlap.

    Raises:
        DataError: a class has no images.
        ValueError: `per_class` is out of range.

    Example:
        >>> len(balanced_subset([0, 0, 0, 0, 1], 2, 3, seed=1, number=0))
        4
    """
    check_at_least_1(per_class=per_class)
    groups = positions_by_class(labels, classes)
    check_no_class_is_empty([len(group) for group in groups])
    chosen = [
        np.sort(
            counted_generator(seed, "balanced subset", number, c).permutation(group)[:per_class]
        )
        for c, group in enumerate(groups)
    ]
    return np.concatenate(chosen)


def member_positions(
    labels: Labels, classes: int, options: SubsetOptions, *, seed: int, member: int
) -> np.ndarray:
    """Positions of the images that a member trains on, int64 (n,), no image twice.

    With U subsets a member m has D_mU ∪ ... ∪ D_(mU + U - 1), so that with 2 its images are those
    of members 2m and 2m + 1 with 1. An image of both counts once, and a class of N_C images or
    fewer gives no more than before: the union is not balanced.

    Args:
        labels: int (N,), 0..C-1.
        classes: C; each needs an image.
        options: N_C and U.
        seed: of the subsets.
        member: m.

    Raises:
        DataError: a class has no images.

    Example:
        >>> options = SubsetOptions(per_class=2, subsets=2)
        >>> len(member_positions([0, 0, 0, 0, 0, 0, 0, 1], 2, options, seed=1, member=0))
        5
    """
    numbers = range(member * options.subsets, (member + 1) * options.subsets)
    subsets = [
        balanced_subset(labels, classes, options.per_class, seed=seed, number=number)
        for number in numbers
    ]
    return subsets[0] if len(subsets) == 1 else np.unique(np.concatenate(subsets))


def report_short_classes(classes: Sequence[str], counts: Sequence[int], per_class: int) -> None:
    """Say which classes give all they have to a balanced subset, as in BTM's experiments."""
    short = [
        f"{name} ({count})"
        for name, count in zip(classes, counts, strict=True)
        if count < per_class
    ]
    if short:
        listed = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        logger.info(
            "%d of %d classes have fewer than CLS.SAMPLER.PER_CLASS = %d images and give all of "
            "them, none twice: %s",
            len(short),
            len(classes),
            per_class,
            listed,
        )
