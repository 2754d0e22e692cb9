"""Features of a data set, how far they move between training and test, and between experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.data.polling import Poll, polled


@dataclass(frozen=True)
class Extracted:
    """What a network says of every image of a data set, in the data set's order.

    Attributes:
        features: float32 (N, d), or (K, N, d) of K experts.
        logits: float32 (N, C), or (K, N, C).
        labels: int64 (N,).
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray

    @property
    def mean_logits(self) -> np.ndarray:
        """(N, C): of several experts their mean, by which they are judged."""
        return self.logits.mean(0) if self.logits.ndim == 3 else self.logits

    @property
    def joined_features(self) -> np.ndarray:
        """(N, d), or (N, K d): of several experts side by side."""
        return np.concatenate(list(self.features), 1) if self.features.ndim == 3 else self.features


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    poll: Poll | None = None,
) -> Extracted:
    """Pooled features, logits and labels of every image.

    Args:
        model: a network or experts, in eval mode; a method's network counts as what it deploys.
        batches: of this process, see `build_test_batches`.
        processes: those that have the other images.
        poll: see `polled`.

    Returns:
        The same in every process.
    """
    network = deployed(model)
    device = next(network.parameters()).device
    parts = []
    for batch in polled(batches, processes, poll):
        features, logits = _outputs(network, batch.views["image"].to(device, non_blocking=True))
        of_batch = (batch.indices, batch.targets, features.float(), logits.float())
        parts.append(tuple(tensor.cpu() for tensor in of_batch))
    gathered = [part for of_process in processes.all_gather(parts) for part in of_process]
    order = torch.cat([part[0] for part in gathered]).argsort()
    labels = torch.cat([part[1] for part in gathered])[order]
    features, logits = (
        torch.cat([part[i] for part in gathered], dim=-2).index_select(-2, order) for i in (2, 3)
    )
    return Extracted(features.numpy(), logits.numpy(), labels.numpy())


def _outputs(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(network, Experts):
        assert isinstance(network, ImageClassifier)
        features = network.features(images)
        return features, network.classifier(features)
    parts = network.expert_features(images)
    logits = [expert.classifier(rows) for expert, rows in zip(network.experts, parts, strict=True)]
    return torch.stack(parts), torch.stack(logits)


def feature_deviation(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    classes: int,
    generator: np.random.Generator,
    draws: int = 1000,
    subset: int | None = None,
) -> np.ndarray:
    """How far a class's mean feature moves from training to test images, dis(c).

    dis(c) = 1/R Σ_r ‖mean of K random training features of c − mean of c's test features‖ with
    features of length 1. Classes are comparable because the means are over equally many.

    Args:
        train_features: (N, d), in eval mode from images that are not augmented.
        train_labels: (N,).
        test_features: (M, d).
        test_labels: (M,).
        classes: C.
        generator: draws the subsets, without replacement within one.
        draws: R.
        subset: K; None takes the size of the smallest class, which may not be exceeded.

    Returns:
        (C,) float64; nan for a class without test or training images.

    Raises:
        ValueError: K or R is out of range.

    Source: MFW (arXiv 2104.01769), section 5.4.

    Example:
        >>> features = np.eye(2)
        >>> labels = np.array([0, 1])
        >>> feature_deviation(
        ...     features, labels, features, labels, classes=2, generator=np.random.default_rng(0)
        ... )
        array([0., 0.])
    """
    counts = np.bincount(train_labels, minlength=classes)
    smallest = int(counts[counts > 0].min())
    subset = smallest if subset is None else subset
    if not 1 <= subset <= smallest:
        raise ValueError(
            f"subset = {subset} is not allowed (must be 1..{smallest}, the smallest class's images)"
        )
    check_at_least_1(draws=draws)
    train, test = unit_rows(train_features), unit_rows(test_features)
    deviation = np.full(classes, np.nan)
    for c in range(classes):
        of_train, of_test = train[train_labels == c], test[test_labels == c]
        if len(of_train) and len(of_test):
            means = _subset_means(of_train, subset, draws, generator)
            deviation[c] = np.linalg.norm(means - of_test.mean(0), axis=1).mean()
    return deviation


def _subset_means(
    rows: np.ndarray, subset: int, draws: int, generator: np.random.Generator
) -> np.ndarray:
    """(draws, d): means of random subsets, by one product with a (draws, n) matrix of shares."""
    if subset == len(rows):  # there is one subset
        return rows.mean(0, keepdims=True)
    # The positions of the K smallest of n random keys are a random K-subset.
    chosen = generator.random((draws, len(rows))).argpartition(subset - 1, axis=1)[:, :subset]
    shares = np.zeros((draws, len(rows)))
    np.put_along_axis(shares, chosen, 1 / subset, axis=1)
    return shares @ rows


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float64; a row of zeros, which a ReLU can leave, stays."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def expert_distances(
    features: np.ndarray, labels: np.ndarray, *, classes: int
) -> dict[tuple[int, int], np.ndarray]:
    """How differently two experts see a class: the mean over its images of ‖v^m − v^n‖.

    Args:
        features: (K, N, d), as the encoders return them, not normalized.
        labels: (N,).
        classes: C.

    Returns:
        (C,) float64 for every pair m < n of experts, counted from 0; nan for a class without
        images.

    Raises:
        ValueError: fewer than two experts.

    Source: ECL, equation 12.

    Example:
        >>> features = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
        >>> expert_distances(features, np.array([0]), classes=2)
        {(0, 1): array([ 5., nan])}
    """
    if features.ndim != 3 or len(features) < 2:
        raise ValueError(
            f"features of shape {features.shape} are not allowed (must be (K, N, d) of K >= 2)"
        )
    wide = features.astype(np.float64)
    return {
        (m, n): class_means(np.linalg.norm(wide[m] - wide[n], axis=1), labels, classes=classes)
        for m, n in itertools.combinations(range(len(features)), 2)
    }


def class_means(values: np.ndarray, labels: np.ndarray, *, classes: int) -> np.ndarray:
    """(C,) float64: the mean of each class's values; nan for a class without images."""
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=values, minlength=classes)
    return sums / np.where(counts > 0, counts, np.nan)
