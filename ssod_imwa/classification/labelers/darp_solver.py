"""DARP's convex program: the nearest labels of given class totals (arXiv 2007.08844)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMOOTHING = 1e-6
SMALLEST_ENTROPY = 1e-3  # nats; of one-hot rows it is 0, and their weight would be infinite


@dataclass(frozen=True)
class Accuracy:
    """How hard the program is solved.

    Attributes:
        rounds: passes over all classes.
        newton_steps: at most so many in a pass.
        tolerance: of a class's total, in images.
    """

    rounds: int = 10
    newton_steps: int = 30
    tolerance: float = 0.1


def without_noise(
    probabilities: torch.Tensor, totals: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """Labels in which each class keeps the entries that it can have, float64 (N, C).

    Class k keeps its ⌊α M_k⌋ largest entries, scaled to the sum M_k; then 1e-6 is added everywhere
    and rows are divided by their sums.

    Args:
        probabilities: (N, C), rows of the sum 1.
        totals: M (C,), images of each class.
        alpha: α, 2 in the paper.

    Source: DARP, section 3.2, removal of noisy entries.
    """
    rows = probabilities.double()
    images = len(rows)
    kept = torch.zeros_like(rows)
    for k, total in enumerate(totals.tolist()):
        best = rows[:, k].topk(min(int(alpha * total), images)).indices
        values = rows[best, k]
        kept[best, k] = values * (total + SMOOTHING) / (values.sum() + SMOOTHING)
    kept += SMOOTHING
    return kept / kept.sum(1, keepdim=True)


def row_weights(rows: torch.Tensor) -> torch.Tensor:
    """1 / H of labels (N, C), float64 (N,); entropies H in nats and at least 1e-3."""
    entropy = -torch.xlogy(rows, rows).sum(1)
    return 1 / entropy.clamp(min=SMALLEST_ENTROPY)


def nearest_labels(
    rows: torch.Tensor,
    weights: torch.Tensor,
    totals: torch.Tensor,
    accuracy: Accuracy = Accuracy(),
) -> torch.Tensor:
    """argmin_X Σ_n w_n KL(X_n ‖ P_n) with Σ_k X_nk = 1 and Σ_n X_nk = M_k, float64 (N, C).

    Coordinate ascent on the dual: X_nk = P_nk a_n exp(−ν_k / w_n). Rows are scaled to 1 by a, then
    for each class ν_k is found by Newton's method on its total, which falls with ν_k.

    Args:
        rows: P (N, C), positive, rows of the sum 1.
        weights: w (N,), positive.
        totals: M (C,), positive, with Σ M = N.
        accuracy: see there.

    Raises:
        ValueError: the totals do not add up to the number of rows, within 1 %.

    Source: DARP, equation 2 and algorithm 1.
    """
    images = len(rows)
    if abs(float(totals.sum()) - images) > 0.01 * images:
        raise ValueError(
            f"totals of the sum {float(totals.sum()):g} are not allowed (must be the {images} rows)"
        )
    # Exactly N, else no X meets both constraints.
    totals = totals.double() * (images / totals.double().sum())
    log_rows, slopes = rows.double().log(), 1 / weights.double()
    prices = torch.zeros_like(totals)
    for _ in range(accuracy.rounds):
        scale = -torch.logsumexp(log_rows - slopes[:, None] * prices, 1)
        prices = _prices(log_rows + scale[:, None], slopes, totals, prices, accuracy)
    return torch.softmax(log_rows - slopes[:, None] * prices, 1)


def _prices(
    logs: torch.Tensor,
    slopes: torch.Tensor,
    totals: torch.Tensor,
    prices: torch.Tensor,
    accuracy: Accuracy,
) -> torch.Tensor:
    """ν (C,) with Σ_n exp(logs_nk − slopes_n ν_k) = M_k, each by Newton's method.

    It works on the logarithm of the sum, which is convex in ν and nearly a straight line: its steps
    arrive from anywhere, where those on the sum itself creep.
    """
    for _ in range(accuracy.newton_steps):
        exponents = logs - slopes[:, None] * prices
        log_sums = torch.logsumexp(exponents, 0)
        if bool(((log_sums.exp() - totals).abs() < accuracy.tolerance).all()):
            break
        slope = slopes @ torch.softmax(exponents, 0)
        prices = prices + (log_sums - totals.log()) / slope
    return prices
