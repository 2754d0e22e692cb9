"""Which images are trained on without their labels.

Classes are numbered 0..C-1, head first. M_k images of class k are unlabeled; their counts have the
shape of the labeled ones, are all the same, or rise where those fall (DASO, arXiv 2106.05682,
section 4.1; ACR, arXiv 2303.11630).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ssod_imwa.classification.data.imbalance import (
    Labels,
    Profile,
    Split,
    choose_images,
    class_orders,
    imbalanced_counts,
    shuffled,
)
from ssod_imwa.config.options import ABOVE_0, Options, option
from ssod_imwa.errors import DataError

Shape = Literal["consistent", "uniform", "reversed"]
Membership = Literal["disjoint", "joint"]


@dataclass(frozen=True)
class UnlabeledOptions(Options):
    """Which images of TRAIN lose their labels, and whether labeled ones are among the unlabeled."""

    maximum: int = option(
        0,
        "M_1, images of the largest class; 0 takes all of TRAIN that are neither labeled nor held "
        "out, as they are",
        low=0,
    )
    shape: Shape = option(
        "consistent",
        "how the counts fall: as the labeled ones, not at all, or from last to first",
        when={"maximum": ABOVE_0},
    )
    ratio: float = option(
        0.0,
        "images of the largest class over those of the smallest; 0 takes CLS.IMBALANCE.RATIO",
        low=0,
        when={"maximum": ABOVE_0, "shape": ("consistent", "reversed")},
    )
    membership: Membership = option(
        "disjoint",
        "whether labeled images are among the unlabeled: none (DASO, ABC), or all (ACR, CoSSL)",
    )


def unlabeled_counts(
    classes: int,
    options: UnlabeledOptions,
    *,
    labeled_ratio: float,
    profile: Profile = "exponential",
) -> list[int]:
    """Unlabeled images of each class (M_k), rounded down.

    Args:
        classes: C.
        options: whose `maximum` is at least 1.
        labeled_ratio: γ of the labeled images, at least 1, which a ratio of 0 stands for.
        profile: of the labeled images.

    Raises:
        DataError: a number is out of range, or a class would be empty.

    Example:
        >>> options = UnlabeledOptions(maximum=4000, shape="reversed")
        >>> unlabeled_counts(10, options, labeled_ratio=100)
        [40, 66, 111, 185, 309, 516, 861, 1437, 2397, 4000]
    """
    if options.shape == "uniform":
        return [options.maximum] * classes
    ratio = options.ratio or labeled_ratio
    counts = imbalanced_counts(classes, maximum=options.maximum, ratio=ratio, profile=profile)
    return counts[::-1] if options.shape == "reversed" else counts


def choose_unlabeled(
    labels: Labels,
    labeled: Sequence[int],
    unlabeled: Sequence[int] | None,
    *,
    split: Split = "cao",
    seed: int = 0,
    hold_out: int = 0,
    membership: Membership = "disjoint",
) -> np.ndarray:
    """Positions of the unlabeled images beside those that `choose_images` labels.

    "cao" and "first" take the images of a class that follow its labeled ones. "pools" takes them
    from a second pool, behind that of the labeled images, of as many as the largest count.

    Args:
        labels: int (N,), 0..C-1, of the images to choose from.
        labeled: N_k, images of each class that keep their labels.
        unlabeled: M_k; None takes all that are left.
        split: see `choose_images`, as the next two.
        seed: of the split.
        hold_out: images of each class that are not chosen from.
        membership: "joint" begins with the labeled images.

    Returns:
        int64.

    Raises:
        DataError: a class has fewer images than asked.

    Example:
        >>> choose_unlabeled([0, 1, 0, 1, 0], [1, 1], [2, 1], split="first").tolist()
        [2, 4, 3]
    """
    choice: dict[str, Any] = {"split": split, "seed": seed, "hold_out": hold_out}
    ordered = class_orders(labels, len(labeled), **choice)
    # A pool is as large as the head's count, so that other images follow it in every class.
    before = [max(labeled)] * len(labeled) if split == "pools" else list(labeled)
    left = [positions[n:] for positions, n in zip(ordered, before, strict=True)]
    if unlabeled is not None:
        _check_enough(ordered, before, unlabeled)
        if split == "pools":
            left = _pooled([x[: max(unlabeled)] for x in left], unlabeled, seed)
        left = [x[:count] for x, count in zip(left, unlabeled, strict=True)]
    if membership == "joint":
        left.insert(0, choose_images(labels, labeled, **choice))
    return np.concatenate(left)


def _pooled(pools: list[np.ndarray], counts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Each class's pool shuffled anew, the largest class's first, as DASO's code goes through."""
    if counts[0] == counts[-1]:
        return pools
    if counts[0] < counts[-1]:
        return shuffled(pools[::-1], seed)[::-1]
    return shuffled(pools, seed)


def _check_enough(
    ordered: Sequence[np.ndarray], before: Sequence[int], unlabeled: Sequence[int]
) -> None:
    for c, (positions, first, count) in enumerate(zip(ordered, before, unlabeled, strict=True)):
        if len(positions) < first + count:
            raise DataError(
                f"class {c} has {len(positions)} images, {first} labeled and {count} unlabeled "
                "ones are asked (lower CLS.IMBALANCE.MAXIMUM or CLS.UNLABELED.MAXIMUM)"
            )
