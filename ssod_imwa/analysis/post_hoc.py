"""What a trained network is worth with another decision on top, nothing being trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.evaluation import (
    class_recalls,
    generalized_mean,
    group_accuracies,
    top_k_accuracy,
)
from ssod_imwa.classification.features import unit_rows
from ssod_imwa.classification.losses.balanced_softmax import post_hoc_logits
from ssod_imwa.classification.models.classifiers import tau_normalized


def accuracies(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    train_counts: Sequence[int] | np.ndarray,
    group_rule: str = "standard",
) -> dict[str, float]:
    """Those metrics that need no probabilities: top1, many, medium, few, h_mean, g_mean.

    Args:
        scores: (N, C), the largest decides.
        labels: (N,).
        train_counts: (C,).
        group_rule: see `group_accuracies`.
    """
    recalls = class_recalls(scores.argmax(1), labels, classes=scores.shape[1])
    return {
        "top1": top_k_accuracy(scores, labels, k=1),
        **group_accuracies(recalls, train_counts, rule=group_rule),
        "h_mean": generalized_mean(recalls, power=-1),
        "g_mean": generalized_mean(recalls, power=0),
    }


def adjustment_sweep(
    logits: np.ndarray,
    labels: np.ndarray,
    taus: Sequence[float] | np.ndarray,
    *,
    train_counts: Sequence[int] | np.ndarray,
    group_rule: str = "standard",
) -> dict[str, np.ndarray]:
    """`accuracies` of `losses.post_hoc_logits`, (taus,) for each name.

    Args:
        logits: (N, C).
        labels: (N,).
        taus: τ; 0 changes nothing, 1 is what theory says for a uniform test set.
        train_counts: (C,).
        group_rule: see `group_accuracies`.
    """
    scores, prior = (
        torch.from_numpy(logits).double(),
        log_prior(np.asarray(train_counts).tolist()).double(),
    )
    return _swept(
        [post_hoc_logits(scores, prior, tau=tau).numpy() for tau in taus],
        labels,
        train_counts=train_counts,
        group_rule=group_rule,
    )


@torch.no_grad()
def tau_norm_sweep(
    features: np.ndarray,
    labels: np.ndarray,
    classifier: nn.Linear,
    taus: Sequence[float] | np.ndarray,
    *,
    train_counts: Sequence[int] | np.ndarray,
    group_rule: str = "standard",
) -> dict[str, np.ndarray]:
    """`accuracies` of τ-normalized classifiers, (taus,) for each name.

    Args:
        features: (N, d).
        labels: (N,).
        classifier: trained.
        taus: τ of `tau_normalized`; 0 is the classifier without its bias.
        train_counts: (C,).
        group_rule: see `group_accuracies`.

    Source: Kang et al. (arXiv 1910.09217), section 4.
    """
    inputs = torch.from_numpy(features).to(classifier.weight)
    return _swept(
        [tau_normalized(classifier, tau)(inputs).float().cpu().numpy() for tau in taus],
        labels,
        train_counts=train_counts,
        group_rule=group_rule,
    )


def _swept(
    scores: Sequence[np.ndarray], labels: np.ndarray, **options: Any
) -> dict[str, np.ndarray]:
    measured = [accuracies(one, labels, **options) for one in scores]
    return {name: np.array([numbers[name] for numbers in measured]) for name in measured[0]}


def nearest_mean_scores(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    classes: int,
) -> np.ndarray:
    """Scores of the nearest class mean classifier (NCM): the classifier's weights are not used.

    Args:
        train_features: (N, d); every class has some.
        train_labels: (N,).
        test_features: (M, d).
        classes: C.

    Returns:
        (M, C) float64, cosines between features and the means of classes' features of length 1.

    Raises:
        ValueError: a class without training images.

    Source: Kang et al. (arXiv 1910.09217), section 4.

    Example:
        >>> train = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> scores = nearest_mean_scores(
        ...     train, np.array([0, 1]), np.array([[3.0, 1.0]]), classes=2
        ... )
        >>> scores.argmax(1)
        array([0])
    """
    counts = np.bincount(train_labels, minlength=classes)
    if counts.min() == 0:
        raise ValueError(f"class {int(counts.argmin())} has no training images (no mean)")
    sums = np.zeros((classes, train_features.shape[1]))
    np.add.at(sums, train_labels, unit_rows(train_features))
    return unit_rows(test_features) @ unit_rows(sums / counts[:, None]).T
