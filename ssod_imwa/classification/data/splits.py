"""The labeled and the unlabeled part of a data set, and unlabeled images of another.

`impose_imbalance` says what keeps its labels, `split_off_unlabeled` what else is trained on.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.imbalance import (
    ImbalanceOptions,
    SelectionOptions,
    choose_images,
    imbalanced_counts,
    largest_maximum,
    rounded_shares,
)
from ssod_imwa.classification.data.unlabeled import (
    Membership,
    UnlabeledOptions,
    choose_unlabeled,
    unlabeled_counts,
)
from ssod_imwa.data.text_files import name_bytes
from ssod_imwa.errors import DataError


def labeled_counts(
    dataset: ClassificationDataset, options: ImbalanceOptions, *, hold_out: int = 0
) -> list[int]:
    """Images of each class that a data set keeps with these options.

    Raises:
        DataError: the images do not suffice, or a class would be empty.
    """
    available = [count - hold_out for count in dataset.counts]
    if options.ratio <= 0:
        counts = rounded_shares(available, options.percent)
        if min(counts) < 1:
            c = next(c for c, count in enumerate(counts) if count < 1)
            raise DataError(
                f"{dataset.name}: class {c} ({dataset.classes[c]}) keeps none of its "
                f"{dataset.counts[c]} images (CLS.IMBALANCE.PERCENT = {options.percent:g}, "
                f"HOLD_OUT = {hold_out}; each class needs at least 1)"
            )
        return counts
    if hold_out and min(available) < 1:
        c = available.index(min(available))
        raise DataError(
            f"{dataset.name}: class {c} ({dataset.classes[c]}) has {dataset.counts[c]} images, "
            f"CLS.IMBALANCE.HOLD_OUT = {hold_out} of each class leaves none to learn"
        )
    ratio, profile = options.ratio, options.profile
    maximum = options.maximum or largest_maximum(available, ratio=ratio, profile=profile)
    return imbalanced_counts(len(dataset.classes), maximum=maximum, ratio=ratio, profile=profile)


def impose_imbalance(
    dataset: ClassificationDataset, options: ImbalanceOptions, selection: SelectionOptions
) -> ClassificationDataset:
    """A long-tailed or step part of a data set, class 0 at the head, or a share of each class.

    The set may be balanced or have a tail already; see `largest_maximum` for thinning.

    Args:
        dataset: has images of every class.
        options: the ratio γ, at least 1, and what else decides over the counts, see
            `imbalanced_counts`.
        selection: see `choose_images`.

    Raises:
        DataError: the images do not suffice, or a class would be empty.

    Example:
        >>> from ssod_imwa.classification.data.datasets import load_digit_images
        >>> digits = load_digit_images("train")
        >>> impose_imbalance(digits, ImbalanceOptions(ratio=20), SelectionOptions()).counts
        [142, 101, 72, 52, 37, 26, 19, 13, 9, 7]
    """
    counts = labeled_counts(dataset, options, hold_out=selection.hold_out)
    try:
        chosen = choose_images(
            dataset.labels,
            counts,
            split=selection.split,
            seed=selection.seed,
            hold_out=selection.hold_out,
        )
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from error
    return dataset.subset(chosen)


def split_off_unlabeled(
    dataset: ClassificationDataset,
    imbalance: ImbalanceOptions,
    selection: SelectionOptions,
    options: UnlabeledOptions,
) -> ClassificationDataset:
    """The unlabeled images of a data set, whose labeled part `impose_imbalance` gives.

    Args:
        dataset: with all labels.
        imbalance: how many images keep their labels.
        selection: which they are.
        options: which others are unlabeled.

    Raises:
        DataError: the images do not suffice.
    """
    labeled = labeled_counts(dataset, imbalance, hold_out=selection.hold_out)
    counts = None
    if options.maximum:
        counts = unlabeled_counts(
            len(labeled),
            options,
            labeled_ratio=imbalance.ratio or 1.0,
            profile=imbalance.profile,
        )
    try:
        chosen = choose_unlabeled(
            dataset.labels,
            labeled,
            counts,
            split=selection.split,
            seed=selection.seed,
            hold_out=selection.hold_out,
            membership=options.membership,
        )
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from error
    return replace(dataset.subset(chosen), is_labeled=False)


def with_labeled(
    unlabeled: ClassificationDataset, labeled: ClassificationDataset, membership: Membership
) -> ClassificationDataset:
    """Unlabeled images of a set of their own, with the labeled ones among them or without.

    Images that both sets hold count once. They are told by their files, or in memory by their
    pixels.

    Args:
        unlabeled: of a set of their own.
        labeled: in memory or in files, as the unlabeled ones.
        membership: "joint" adds the labeled images; "disjoint" refuses images that both sets hold.

    Raises:
        DataError: both sets hold an image and may not, or one is in memory and the other is not,
            or their images have other sizes.
    """
    check_same_kind(unlabeled, labeled)
    seen = set(_digests(unlabeled))
    shared = [i for i, digest in enumerate(_digests(labeled)) if digest in seen]
    if membership == "disjoint":
        if shared:
            raise DataError(
                f"{unlabeled.name}: {len(shared)} of {len(labeled)} labeled images of "
                f"{labeled.name} are among the unlabeled, the first is "
                f"{_named(labeled, shared[0])} (take them out, or set "
                "CLS.UNLABELED.MEMBERSHIP joint, which allows them)"
            )
        return unlabeled
    others = np.setdiff1d(np.arange(len(labeled)), shared)
    return join_unlabeled(unlabeled, labeled.subset(others))


def labeled_among(unlabeled: ClassificationDataset, labeled: ClassificationDataset) -> torch.Tensor:
    """Which unlabeled images are labeled ones, too, bool (N_u,); told as in `with_labeled`."""
    known = set(_digests(labeled))
    return torch.tensor([digest in known for digest in _digests(unlabeled)], dtype=torch.bool)


def _digests(dataset: ClassificationDataset) -> list[bytes]:
    if dataset.distinctive is None:
        return [name_bytes(file) for file in dataset.files]
    rows = dataset.distinctive.flatten(1).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]


def _named(dataset: ClassificationDataset, position: int) -> str:
    return dataset.files[position] if dataset.files else f"number {position}"


def join_unlabeled(
    first: ClassificationDataset, second: ClassificationDataset
) -> ClassificationDataset:
    """The images of two sets, both in memory or both in files, as unlabeled ones.

    Raises:
        DataError: one is in memory and the other is not, or their images have other sizes.
    """
    check_same_kind(first, second)
    images = None
    if first.images is not None and second.images is not None:
        images = torch.cat([first.images, second.images])
    return replace(
        first,
        labels=torch.cat([first.labels, second.labels]),
        images=images,
        files=(*first.files, *second.files),
        is_labeled=False,
    )


def check_same_kind(first: ClassificationDataset, second: ClassificationDataset) -> None:
    """Refuse two sets whose images cannot be trained on together.

    Raises:
        DataError: one is in memory and the other is not, or their images have other sizes.
    """
    if (first.images is None) != (second.images is None):
        files, memory = (first, second) if first.images is None else (second, first)
        raise DataError(
            f"images of {files.name} are in files and those of {memory.name} in memory (set "
            "CLS.INPUT.IN_MEMORY True, which reads files into memory)"
        )
    if first.size != second.size:
        raise DataError(
            f"images of {first.name} have {first.size}, those of {second.name} {second.size} (in "
            "memory all must have one size)"
        )
