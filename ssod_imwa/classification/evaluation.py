"""How good a classifier is on a balanced test set, overall and for the rare classes.

Inputs are NumPy arrays over the N test images and C classes: scores or probabilities (N, C) of any
floating-point type (of a tensor, `.float().cpu().numpy()`), predictions and labels (N,) integers in
0..C-1. Results are fractions, not percent. The confusion matrix is scikit-learn's, called directly:
`confusion_matrix(labels, predictions, labels=range(C))`, `normalize="true"` for rows of the sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import recall_score

from ssod_imwa.classification.checks import check_at_least_1, check_choice
from ssod_imwa.config.options import Options, option

ZERO_RECALL = 1e-3  # what a recall of 0 counts as in the means (BTM, section 4.2)
GROUP_RULES = ("standard", "mislas")


@dataclass(frozen=True)
class GroupOptions(Options):
    """How classes are grouped."""

    group_rule: str = option(
        "standard", "rule for classes of many, medium and few images", choices=GROUP_RULES
    )


def classification_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    train_counts: Sequence[int] | np.ndarray,
    group_rule: str = "standard",
) -> dict[str, float]:
    """All numbers of a table's row.

    Args:
        probabilities: (N, C) in [0, 1].
        labels: (N,).
        train_counts: (C,) training images of each class, for the groups.
        group_rule: standard or mislas, see `group_accuracies`.

    Returns:
        `top1`, `top5` (from five classes on), `many`, `medium`, `few` (those that have classes),
        `mean_recall` (over classes; `top1` where all have equally many test images), `h_mean`,
        `g_mean`, `lowest_recall`, `zero_recall_classes` (their number: one of them adds
        1000 / C to the inverse of h_mean) and `ece` (15 bins).

    Raises:
        ValueError: arrays that do not fit or are out of range.

    Example:
        >>> metrics = classification_metrics(
        ...     np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]), train_counts=[500, 5]
        ... )
        >>> metrics["top1"], metrics["many"], metrics["few"], metrics["zero_recall_classes"]
        (0.5, 1.0, 0.0, 1.0)
    """
    probabilities, labels = _checked_scores(probabilities, labels)
    classes = probabilities.shape[1]
    recalls = class_recalls(probabilities.argmax(1), labels, classes=classes)
    metrics = {"top1": top_k_accuracy(probabilities, labels, k=1)}
    if classes >= 5:
        metrics["top5"] = top_k_accuracy(probabilities, labels, k=5)
    return {
        **metrics,
        **group_accuracies(recalls, train_counts, rule=group_rule),
        "mean_recall": float(np.nanmean(recalls)),
        "h_mean": generalized_mean(recalls, power=-1),
        "g_mean": generalized_mean(recalls, power=0),
        "lowest_recall": float(np.nanmin(recalls)),
        "zero_recall_classes": float((recalls == 0).sum()),
        "ece": expected_calibration_error(reliability_bins(probabilities, labels)),
    }


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, *, k: int) -> float:
    """The share of images whose label is among the k highest scores.

    Of equal scores the one of the lower class index is higher, as for argmax.

    Args:
        scores: (N, C) logits or probabilities.
        labels: (N,).
        k: 1..C.

    Raises:
        ValueError: arrays that do not fit, scores with nan, or k out of range.

    Example:
        >>> scores = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
        >>> top_k_accuracy(scores, np.array([1, 2]), k=2)
        0.5
    """
    scores, labels = _checked_scores(scores, labels)
    classes = scores.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"k = {k} is not allowed (must be 1..C = {classes})")
    of_label = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(classes) < labels[:, None]
    rank = ((scores > of_label) | ((scores == of_label) & before)).sum(1)
    return float((rank < k).mean())


def class_recalls(predictions: np.ndarray, labels: np.ndarray, *, classes: int) -> np.ndarray:
    """The share of each class's images that are predicted as it, r_c.

    Args:
        predictions: (N,).
        labels: (N,).
        classes: C.

    Returns:
        (C,) float64; nan for a class without test images.

    Raises:
        ValueError: arrays that do not fit or are out of range.

    Example:
        >>> class_recalls(np.array([0, 1, 1]), np.array([0, 0, 1]), classes=3)
        array([0.5, 1. , nan])
    """
    predictions = _checked_classes("predictions", predictions, classes)
    labels = _checked_classes("labels", labels, classes)
    if len(predictions) != len(labels):
        raise ValueError(
            f"{len(predictions)} predictions do not fit {len(labels)} labels (must be one each)"
        )
    return recall_score(
        labels, predictions, labels=np.arange(classes), average=None, zero_division=np.nan
    )


def group_accuracies(
    recalls: np.ndarray, train_counts: Sequence[int] | np.ndarray, *, rule: str = "standard"
) -> dict[str, float]:
    """The mean recall of classes with many, medium and few training images.

    standard: many above 100, few below 20 images, medium between. mislas: few up to 20, which gives
    MiSLAS's groups for Places-LT and iNaturalist 2018 (its ranges for ImageNet-LT and CIFAR-100
    follow no threshold).

    Args:
        recalls: (C,) of `class_recalls`.
        train_counts: (C,) training images of each class.
        rule: standard or mislas.

    Returns:
        `many`, `medium` and `few`, means over tested classes; nan for a group of which none is
        tested, and nothing for one that has no classes.

    Raises:
        ValueError: recalls or counts that do not fit, or an unknown rule.

    Source: OLTR (arXiv 1904.05160) and decoupling's public code; ECL, section VI-B.

    Example:
        >>> group_accuracies(np.array([0.9, 0.5, 0.25]), [500, 101, 5])
        {'many': 0.7, 'few': 0.25}
    """
    check_choice("rule", rule, GROUP_RULES)
    recalls = np.asarray(recalls, dtype=np.float64)
    counts = np.asarray(train_counts)
    if counts.shape != recalls.shape:
        raise ValueError(
            f"train_counts of shape {counts.shape} do not fit recalls of shape {recalls.shape}"
            " (must be one a class)"
        )
    few = counts < 20 if rule == "standard" else counts <= 20
    groups = {"many": counts > 100, "medium": ~few & (counts <= 100), "few": few}
    tested = ~np.isnan(recalls)
    return {
        name: float(recalls[members & tested].mean()) if (members & tested).any() else math.nan
        for name, members in groups.items()
        if members.any()
    }


def generalized_mean(recalls: np.ndarray, *, power: float) -> float:
    """The power mean (1/C Σ r_c^p)^(1/p) of the recalls, a recall of 0 counting as 0.001.

    Classes without test images (nan) are left out. The lowest recall itself, which may be 0, is
    `np.nanmin(recalls)`.

    Args:
        recalls: (C,) in [0, 1] of `class_recalls`.
        power: p: -1 is the harmonic (H-mean), 0 the geometric (G-mean) and 1 the arithmetic mean,
            -inf the smallest and inf the largest recall.

    Raises:
        ValueError: no recall, recalls out of range, or a power of nan.

    Source: BTM, equation 1 and section 4.2.

    Example:
        >>> generalized_mean(np.array([0.5, 1.0]), power=-1)
        0.6666666666666666
        >>> round(generalized_mean(np.array([0.0, 1.0]), power=0), 6)
        0.031623
    """
    if math.isnan(power):
        raise ValueError("power = nan is not allowed (must be a number, -inf or inf)")
    recalls = np.asarray(recalls, dtype=np.float64)
    recalls = recalls[~np.isnan(recalls)]
    if len(recalls) == 0:
        raise ValueError("recalls of no class are not allowed (must be at least one)")
    if recalls.min() < 0 or recalls.max() > 1:
        raise ValueError(
            f"recalls from {recalls.min():g} to {recalls.max():g} are not allowed"
            " (must be fractions, between 0 and 1)"
        )
    recalls = np.where(recalls > 0, recalls, ZERO_RECALL)
    if math.isinf(power):
        return float(recalls.max() if power > 0 else recalls.min())
    if power == -1:
        return float(len(recalls) / (1 / recalls).sum())
    logs = np.log(recalls)
    if power == 0:
        return float(np.exp(logs.mean()))
    # The sum in logarithms: 0.001^p overflows for p below -100.
    return float(np.exp((np.logaddexp.reduce(power * logs) - math.log(len(logs))) / power))


@dataclass(frozen=True)
class ReliabilityBins:
    """Test images by their confidence, the highest probability, in bins of equal width.

    Attributes:
        images: (bins,) int64, how many images lie in the bin.
        confidence: (bins,) float64, their mean confidence; nan without images.
        accuracy: (bins,) float64, the share that is right; nan without images.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_bins(
    probabilities: np.ndarray, labels: np.ndarray, *, bins: int = 15
) -> ReliabilityBins:
    """The reliability diagram: bins (0, 1/bins], (1/bins, 2/bins], ... of the confidence.

    A confidence of 0 belongs to the first bin.

    Args:
        probabilities: (N, C) in [0, 1]; not logits.
        labels: (N,).
        bins: at least 1.

    Raises:
        ValueError: arrays that do not fit, probabilities out of range, or bins below 1.

    Source: Guo et al. (arXiv 1706.04599), section 2, with the public code's closed right edges.

    Example:
        >>> bins = reliability_bins(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([1, 0]), bins=2)
        >>> bins.images, bins.accuracy
        (array([1, 1]), array([0., 1.]))
    """
    check_at_least_1(bins=bins)
    probabilities, labels = _checked_scores(probabilities, labels)
    # The slack is the rounding of half precision.
    if probabilities.min() < 0 or probabilities.max() > 1 + 1e-3:
        raise ValueError(
            f"probabilities from {probabilities.min():g} to {probabilities.max():g} are not allowed"
            " (must be between 0 and 1: give the softmax of logits)"
        )
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    upper_edges = np.arange(1, bins + 1) / bins
    index = np.minimum(np.searchsorted(upper_edges, confidence, side="left"), bins - 1)
    images = np.bincount(index, minlength=bins)
    divisor = np.where(images > 0, images, np.nan)
    return ReliabilityBins(
        images=images,
        confidence=np.bincount(index, weights=confidence, minlength=bins) / divisor,
        accuracy=np.bincount(index, weights=right, minlength=bins) / divisor,
    )


def expected_calibration_error(bins: ReliabilityBins) -> float:
    """ECE: the mean over images of |accuracy − confidence| of their bin.

    ECL's equation 13 has the absolute value inside the sum over a bin's images, which measures
    something else; this is the usual form.

    Example:
        >>> bins = reliability_bins(np.array([[0.75, 0.25]]), np.array([0]))
        >>> expected_calibration_error(bins)
        0.25
    """
    filled = bins.images > 0
    gaps = np.abs(bins.accuracy - bins.confidence)[filled]
    return float((bins.images[filled] * gaps).sum() / bins.images.sum())


def maximum_calibration_error(bins: ReliabilityBins) -> float:
    """MCE: the largest |accuracy − confidence| of a bin with images."""
    return float(np.nanmax(np.abs(bins.accuracy - bins.confidence)))


def _checked_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores of shape {scores.shape} are not allowed (must be (N, C))")
    labels = _checked_classes("labels", labels, scores.shape[1])
    if len(scores) != len(labels):
        raise ValueError(
            f"scores of shape {scores.shape} do not fit {len(labels)} labels (must be a row each)"
        )
    if np.isnan(scores).any():
        raise ValueError("scores with nan are not allowed (must be numbers: did training diverge?)")
    return scores, labels


def _checked_classes(name: str, values: np.ndarray, classes: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} of shape {values.shape} and type {values.dtype} are not allowed"
            " (must be a row of integers, at least one)"
        )
    if values.min() < 0 or values.max() >= classes:
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} with {wrong} are not allowed (must be 0..{classes - 1})")
    return values
