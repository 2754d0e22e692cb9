"""DARP's estimate of how many unlabeled images each class has (arXiv 2007.08844)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LARGEST_CONDITION = 100.0  # of a confusion matrix whose solution is believed


def soft_confusion(
    probabilities: np.ndarray, labels: np.ndarray | Sequence[int], *, classes: int
) -> np.ndarray:
    """How images of each class are predicted on average, float64 (C, C).

    Args:
        probabilities: (n, C) of images that were not trained on, some of each class.
        labels: int (n,), their classes.
        classes: C.

    Returns:
        Column k is the mean prediction of the images of class k.

    Raises:
        ValueError: a class has no image.

    Example:
        >>> soft_confusion(np.array([[0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]), [0, 0, 1], classes=2)
        array([[0.5, 0. ],
               [0.5, 1. ]])
    """
    one_hot = np.eye(classes)[np.asarray(labels)]
    images = one_hot.sum(0)
    if images.min() == 0:
        raise ValueError(f"class {images.argmin()} has no image (each needs at least 1)")
    return probabilities.T.astype(np.float64) @ (one_hot / images)


def solve_totals(confusion: np.ndarray, predicted: np.ndarray) -> np.ndarray | None:
    """The totals M (C,) that explain what is predicted: confusion @ M = predicted.

    Args:
        confusion: (C, C) of `soft_confusion`.
        predicted: (C,), the sum of the predictions of all unlabeled images.

    Returns:
        None for a matrix of a condition of 100 or more, and where a total is negative.

    Example:
        >>> solve_totals(np.array([[0.5, 0.0], [0.5, 1.0]]), np.array([2.0, 5.0]))
        array([4., 3.])
    """
    if not np.linalg.cond(confusion) < LARGEST_CONDITION:
        return None
    totals = np.linalg.solve(confusion, predicted)
    return totals if totals.min() >= 0 else None
