"""What losses need to know of the class frequencies, computed once from the training counts.

Every function takes the number n_c of training images of each of the C classes, at least 1 a class,
and returns a float32 tensor (C,) on the CPU, computed in float64: make it a buffer of the method.
The counts are the actual ones, never those of a nominal imbalance ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def checked_counts(counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The counts as a float64 tensor (C,) on the CPU.

    Raises:
        ValueError: not a row of numbers, no class, or a class without images.

    Example:
        >>> checked_counts([5000, 50])
        tensor([5000.,   50.], dtype=torch.float64)
    """
    checked = torch.as_tensor(counts).to("cpu", torch.float64)
    if checked.dim() != 1 or len(checked) == 0:
        raise ValueError(
            f"counts of shape {tuple(checked.shape)} are not allowed (must be one number a class)"
        )
    for label, count in enumerate(checked.tolist()):
        if not 1 <= count < math.inf:
            raise ValueError(
                f"counts[{label}] = {count:g} is not allowed"
                " (must be at least 1: leave classes without training images out)"
            )
    return checked


def prior(counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The prior π_c = n_c / Σ n.

    Example:
        >>> prior([3, 1])
        tensor([0.7500, 0.2500])
    """
    checked = checked_counts(counts)
    return (checked / checked.sum()).float()


def log_prior(counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The log prior log π_c, with π_c = n_c / Σ n, the prior of balanced softmax, PaCo and GML.

    Example:
        >>> log_prior([3, 1]).exp()
        tensor([0.7500, 0.2500])
    """
    checked = checked_counts(counts)
    return (checked.log() - checked.sum().log()).float()


def log_odds(counts: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The log odds log π_c − log(1 − π_c), LiVT's margin for `balanced_bce_loss`.

    Raises:
        ValueError: counts that `checked_counts` refuses, or one class alone.

    Source: LiVT (arXiv 2212.02015), balanced binary cross-entropy, in its public code's form.

    Example:
        >>> log_odds([1, 1])
        tensor([0., 0.])
    """
    checked = checked_counts(counts)
    if len(checked) == 1:
        raise ValueError("1 class is not allowed (its odds are infinite: must be at least 2)")
    return (checked.log() - (checked.sum() - checked).log()).float()


def effective_number_weights(
    counts: Sequence[int] | torch.Tensor, *, beta: float = 0.9999
) -> torch.Tensor:
    """Class-balanced weights w_c ∝ (1 − β) / (1 − β^n_c), with Σ w_c = C.

    `F.cross_entropy(..., weight=w)` divides by the weights of the batch, not by its size; published
    numbers do the same.

    Args:
        counts: training images of each class.
        beta: β in [0, 1); 0 gives equal weights, towards 1 they approach 1 / n_c.

    Raises:
        ValueError: counts that `checked_counts` refuses, or beta out of range.

    Source: Class-Balanced Loss (Cui et al., arXiv 1901.05555), section 4; sum as in LDAM's code.

    Example:
        >>> effective_number_weights([1, 2], beta=0.5)
        tensor([1.2000, 0.8000])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta = {beta} is not allowed (must be 0 or more, below 1)")
    checked = checked_counts(counts)
    # expm1 keeps the digits of 1 - β^n where β is near 1; the factor 1 - β cancels in the scaling.
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = -1 / torch.expm1(checked * log_beta)
    return (weights * (len(checked) / weights.sum())).float()


def deferred_weights(weights: torch.Tensor, *, progress: float, start: float = 0.8) -> torch.Tensor:
    """DRW: ones until `start` of the training, the given class weights from there on.

    The public code's switch, epoch 160 of 200, is the default; as a fraction it also holds for
    other lengths.

    Args:
        weights: (C,) for instance `effective_number_weights`.
        progress: the part of the training done, in [0, 1]: epoch / epochs, counted from 0.
        start: the progress from which the weights count.

    Raises:
        ValueError: progress or start out of range.

    Source: LDAM-DRW (arXiv 1906.07413), method 1.

    Example:
        >>> deferred_weights(torch.tensor([0.5, 1.5]), progress=159 / 200)
        tensor([1., 1.])
        >>> deferred_weights(torch.tensor([0.5, 1.5]), progress=160 / 200)
        tensor([0.5000, 1.5000])
    """
    for name, value in (("progress", progress), ("start", start)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value} is not allowed (must be between 0 and 1)")
    return weights if progress >= start else torch.ones_like(weights)


def ldam_margins(counts: Sequence[int] | torch.Tensor, *, largest: float = 0.5) -> torch.Tensor:
    """LDAM's margins Δ_c ∝ n_c^(−1/4), the largest of them `largest`.

    Args:
        counts: training images of each class.
        largest: margin of the rarest class, in cosine units; 0 or more.

    Raises:
        ValueError: counts that `checked_counts` refuses, or largest out of range.

    Source: LDAM (arXiv 1906.07413), section 3; the scaling is its public code's.

    Example:
        >>> ldam_margins([16, 1])
        tensor([0.2500, 0.5000])
    """
    if not 0 <= largest < math.inf:
        raise ValueError(f"largest = {largest} is not allowed (must be 0 or more)")
    margins = checked_counts(counts) ** -0.25
    return (margins * (largest / margins.max())).float()


def smoothing_by_class(
    counts: Sequence[int] | torch.Tensor, *, head: float, tail: float
) -> torch.Tensor:
    """MiSLAS's label smoothing ε_c, from `tail` for the rarest class to `head` for the largest.

    With x = (n_c − n_min) / (n_max − n_min), a class lies at sin(πx/2) of the way from tail to
    head, the paper's concave form. With equal counts all classes are largest ones and have `head`;
    the paper leaves that case open.

    Args:
        counts: training images of each class.
        head: ε_1 in [0, 1).
        tail: ε_K in [0, head].

    Raises:
        ValueError: counts that `checked_counts` refuses, or smoothing out of range.

    Source: MiSLAS (arXiv 2104.00466), section 3.2.

    Example:
        >>> smoothing_by_class([100, 50, 1], head=0.4, tail=0.1)
        tensor([0.4000, 0.3104, 0.1000])
    """
    if not 0 <= tail <= head < 1:
        raise ValueError(
            f"head = {head}, tail = {tail} is not allowed (must be 0 <= tail <= head < 1)"
        )
    checked = checked_counts(counts)
    span = checked.max() - checked.min()
    x = (checked - checked.min()) / span if span > 0 else torch.ones_like(checked)
    return (tail + (head - tail) * torch.sin(x * (math.pi / 2))).float()
