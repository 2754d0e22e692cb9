"""How many labeled images each class keeps, and which.

Classes are numbered 0..C-1, head first. Counts are those of the published long-tailed and step
variants of CIFAR and Tiny-ImageNet (Cao et al., arXiv 1906.07413).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from ssod_imwa.classification.checks import check_choice
from ssod_imwa.config.options import ABOVE_0, Options, option
from ssod_imwa.data.profiles import exponential_profile, step_profile
from ssod_imwa.errors import DataError

Profile = Literal["exponential", "step"]
Split = Literal["cao", "first", "pools"]
Labels = Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class ImbalanceOptions(Options):
    """How many labeled images of each class there are."""

    ratio: float = option(
        0.0, "images of class 0 over those of the last class; 0 takes the set as it is", low=0
    )
    profile: Profile = option(
        "exponential", "how the counts fall from class to class", when={"ratio": ABOVE_0}
    )
    maximum: int = option(
        0, "images of class 0; 0 takes as many as there may be", low=0, when={"ratio": ABOVE_0}
    )
    percent: float = option(
        100.0,
        "share of each class that is kept, rounded half to even (ImageNet-127: 10)",
        above=0,
        high=100,
        when={"ratio": (0,)},
    )


@dataclass(frozen=True)
class SelectionOptions(Options):
    """Which images those are."""

    split: Split = option(
        "cao",
        "which images are kept: shuffled by SEED, the first of the data set (ACR), or shuffled "
        "twice in a pool of as many of each class as class 0 keeps (DASO)",
    )
    seed: int = option(
        0,
        "of the choice, apart from the run's; -1 takes the run's",
        low=-1,
        high=2**32 - 1,
        when={"split": ("cao", "pools")},
    )
    hold_out: int = option(
        0,
        "images of each class that are set aside before any are chosen, for validation (DASO: 500 "
        "of CIFAR-10's, 50 of CIFAR-100's and STL-10's)",
        low=0,
    )


_PROFILES = {"exponential": exponential_profile, "step": step_profile}


def imbalanced_counts(
    classes: int, *, maximum: int, ratio: float, profile: Profile = "exponential"
) -> list[int]:
    """Images of each class: `maximum` times the profile, rounded down.

    The ratio of these counts may exceed `ratio`: CIFAR-100-LT with ratio 200 ends at 2 images, not
    2.5, which is 250. Priors and weights have to come from the counts.

    Args:
        classes: C, at least 1.
        maximum: images of class 0 (n_max), at least 1.
        ratio: γ, at least 1; see the profiles.
        profile: "exponential" (long-tailed) or "step".

    Raises:
        DataError: a number is out of range, or a class would be empty.
        ValueError: the profile is not known.

    Example:
        >>> imbalanced_counts(10, maximum=5000, ratio=100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> imbalanced_counts(4, maximum=500, ratio=100, profile="step")
        [500, 500, 5, 5]
    """
    check_choice("profile", profile, get_args(Profile))
    if maximum < 1:
        raise DataError(f"maximum = {maximum} is not allowed (must be at least 1 image a class)")
    counts = _truncated(_PROFILES[profile](classes, ratio), maximum)
    if 0 in counts:
        raise DataError(
            f"ratio = {ratio} with maximum = {maximum} leaves class {counts.index(0)} of {classes} "
            "without images (maximum must be at least ratio)"
        )
    return counts


def largest_maximum(
    available: Sequence[int], *, ratio: float, profile: Profile = "exponential"
) -> int:
    """The largest `maximum` of `imbalanced_counts` that the available images allow.

    Also maximum / ratio does not exceed the images of the last class, so that rounding down never
    makes the set more imbalanced than asked where the data would allow the ratio itself. This is
    what thins a set that is long-tailed already: its tail limits its head.

    Args:
        available: images of each class, head first.
        ratio: γ of the thinned set, at least 1.
        profile: "exponential" or "step".

    Raises:
        DataError: `ratio` is out of range or no class may keep an image.
        ValueError: the profile is not known.

    Example:
        CIFAR-10-LT with ratio 100, thinned to ratio 50.

        >>> available = imbalanced_counts(10, maximum=5000, ratio=100)
        >>> largest_maximum(available, ratio=50)
        2500
    """
    check_choice("profile", profile, get_args(Profile))
    shares = _PROFILES[profile](len(available), ratio)

    def exceeds(maximum: int) -> bool:
        counts = _truncated(shares, maximum)
        too_many = any(count > n for count, n in zip(counts, available, strict=True))
        return too_many or maximum > ratio * available[-1]

    largest = bisect_left(range(1, max(available) + 1), True, key=exceeds)
    if largest < 1 or 0 in _truncated(shares, largest):
        raise DataError(
            f"ratio = {ratio} is not possible with {min(available)} to {max(available)} images a "
            "class (a class would be left without images; choose a smaller ratio)"
        )
    return largest


def rounded_shares(available: Sequence[int], percent: float) -> list[int]:
    """Images of each class when it keeps a share of those available, rounded half to even.

    Args:
        available: images of each class.
        percent: above 0, at most 100.

    Example:
        >>> rounded_shares([1300, 25, 15], 10)
        [130, 2, 2]
    """
    return np.around(np.asarray(available) * (percent / 100)).astype(int).tolist()


def choose_images(
    labels: Labels,
    counts: Sequence[int],
    *,
    split: Split = "cao",
    seed: int = 0,
    hold_out: int = 0,
) -> np.ndarray:
    """Positions of the images that an imbalanced set keeps, class after class.

    For one seed a smaller count keeps a part of what a larger one keeps (but of "pools").

    Args:
        labels: int (N,), 0..C-1, of the images to choose from.
        counts: images to keep of each class, 0 or more.
        split: "cao": per class, in the order of the labels, shuffle with NumPy's legacy generator
            and keep the first; seed 0 gives the split of Cao et al. (arXiv 1906.07413). "first":
            keep the first in the order of the data set. "pools": of what "cao" would keep if each
            class had the largest count, shuffle anew and keep the first (DASO's code).
        seed: of the split, 0..2^32 - 1, apart from the run's seed; "first" does not use it.
        hold_out: images of each class that are not chosen from: drawn by the seed, or the last.

    Returns:
        int64 (sum of counts,).

    Raises:
        DataError: a class has fewer images than asked.
        ValueError: the split is not known.

    Example:
        >>> choose_images([0, 1, 0, 1, 0], [2, 1], split="first").tolist()
        [0, 2, 1]
    """
    ordered = class_orders(labels, len(counts), split=split, seed=seed, hold_out=hold_out)
    for c, positions in enumerate(ordered):
        if len(positions) < counts[c]:
            raise DataError(
                f"class {c} has {len(positions)} images, {counts[c]} are asked (lower the maximum "
                "or raise the ratio)"
            )
    if split == "pools":
        ordered = shuffled([positions[: max(counts)] for positions in ordered], seed)
    return np.concatenate([x[:count] for x, count in zip(ordered, counts, strict=True)])


def class_orders(
    labels: Labels, classes: int, *, split: Split, seed: int, hold_out: int = 0
) -> list[np.ndarray]:
    """Positions of each class's images in the order in which a split takes them, int64.

    Args:
        labels: int (N,), 0..C-1.
        classes: C.
        split: see `choose_images`; both that shuffle begin with the same order.
        seed: of the split.
        hold_out: images of each class that are left out.

    Raises:
        DataError: a label is outside 0..C-1, or a class has no more images than are held out.
        ValueError: the split is not known.
    """
    check_choice("split", split, get_args(Split))
    ordered = positions_by_class(labels, classes)
    for c, positions in enumerate(ordered):
        if hold_out and len(positions) <= hold_out:
            raise DataError(
                f"class {c} has {len(positions)} images, {hold_out} of each class are held out "
                "(lower CLS.IMBALANCE.HOLD_OUT)"
            )
    if split == "first":
        return [positions[: len(positions) - hold_out] for positions in ordered]
    if hold_out:
        ordered = [positions[hold_out:] for positions in shuffled(ordered, seed)]
    return shuffled(ordered, seed)


def held_out_images(
    labels: Labels, classes: int, *, split: Split, seed: int, hold_out: int
) -> np.ndarray:
    """Positions of the images that `class_orders` leaves out, class after class, int64.

    Example:
        >>> held_out_images([0, 1, 0, 1], 2, split="first", seed=0, hold_out=1).tolist()
        [2, 3]
    """
    chosen = class_orders(labels, classes, split=split, seed=seed, hold_out=hold_out)
    everything = positions_by_class(labels, classes)
    left = [np.setdiff1d(x, y) for x, y in zip(everything, chosen, strict=True)]
    return np.concatenate(left)


def shuffled(ordered: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Copies of arrays, shuffled one after the other by one legacy generator of NumPy.

    One stream for all classes, consumed in label order, makes the split Cao's.
    """
    generator = np.random.RandomState(seed)
    return [generator.permutation(positions) for positions in ordered]


def positions_by_class(labels: Labels, classes: int) -> list[np.ndarray]:
    """For each class, the positions of its images in ascending order, int64.

    Raises:
        DataError: a label is outside 0..classes - 1.

    Example:
        >>> [positions.tolist() for positions in positions_by_class([1, 0, 1], 3)]
        [[1], [0, 2], []]
    """
    array = np.asarray(labels, dtype=np.int64)
    if len(array) and not (array.min() >= 0 and array.max() < classes):
        raise DataError(
            f"labels are {array.min()}..{array.max()}, with {classes} classes they must be "
            f"0..{classes - 1}"
        )
    order = np.argsort(array, kind="stable")
    ends = np.cumsum(np.bincount(array, minlength=classes))
    return np.split(order, ends[:-1])


def check_no_class_is_empty(counts: Sequence[int] | np.ndarray) -> None:
    """Raise DataError if a class has no images, as samplers that draw classes need some of each."""
    empty = np.flatnonzero(np.asarray(counts) == 0)
    if len(empty):
        raise DataError(
            f"class {empty[0]} has no images ({len(empty)} of {len(counts)} classes; a sampler "
            "that draws classes needs at least 1 of each)"
        )


def _truncated(shares: Sequence[float], maximum: int) -> list[int]:
    return [_floor(maximum * share) for share in shares]


def _floor(value: float) -> int:
    # 49 * 49^-1 is 0.9999999999999999 in floating point, and the class still has its 1 image.
    return int(value * (1 + 1e-12))
