"""Losses of class-imbalanced classification, without state; cross-entropy is torch's own.

Logits are (B, C) floating point, labels (B,) int64 in 0..C-1. Half-precision logits are widened to
float32, so that the loss of a large logit neither overflows nor loses the small probabilities; the
result is a scalar of at least float32, the mean over images, 0 without images. What depends on the
class frequencies comes from `class_counts` and lies on the logits' device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

GML_FLOOR = 1e-5  # least probability of the true class in GML's public code


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Focal loss over the softmax: the mean of (1 − p_y)^γ · −log p_y.

    Args:
        logits: (B, C).
        labels: (B,).
        gamma: γ, 0 or more; 0 is the cross-entropy.

    Raises:
        ValueError: gamma out of range.

    Source: Focal Loss (Lin et al., arXiv 1708.02002), equation 4, for the softmax as in LDAM's
    public code; without its class weights.

    Example:
        >>> focal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), gamma=1.0)
        tensor(0.3466)
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma = {gamma} is not allowed (must be 0 or more)")
    cross_entropy = F.cross_entropy(widened(logits), labels, reduction="none")
    # expm1 keeps the digits of 1 - p where p is near 1; the clamp keeps the gradient of its power
    # finite at p = 1, where the limit is 0 but γ < 1 computes infinity times 0.
    missing = (-torch.expm1(-cross_entropy)).clamp(min=torch.finfo(cross_entropy.dtype).tiny)
    return _mean(missing**gamma * cross_entropy)


def ldam_loss(
    cosines: torch.Tensor,
    labels: torch.Tensor,
    margins: torch.Tensor,
    *,
    scale: float = 30.0,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Label-distribution-aware margin loss: cross-entropy of s · (cos_c − Δ_y [c = y]).

    Args:
        cosines: (B, C) in [-1, 1], a cosine classifier's output before any scale.
        labels: (B,).
        margins: (C,) Δ of `ldam_margins`.
        scale: s, above 0.
        weight: (C,) class weights, DRW's; the mean then divides by the weights of the batch.

    Raises:
        ValueError: scale out of range, or margins that are not one a class.

    Source: LDAM (arXiv 1906.07413), section 3; the scale is its public code's.

    Example:
        >>> ldam_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]), torch.tensor([0.5, 0.1]))
        tensor(0.6931)
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale} is not allowed (must be above 0)")
    _check_one_a_class("margins", margins, cosines)
    cosines = widened(cosines)
    margin = margins.to(cosines.dtype)[labels]
    shifted = cosines.scatter_add(1, labels[:, None], -margin[:, None])
    if len(labels) == 0:
        return shifted.sum()  # torch's mean of nothing is nan
    if weight is not None:
        weight = weight.to(cosines.dtype)
    return F.cross_entropy(scale * shifted, labels, weight=weight)


def logit_adjusted_loss(
    logits: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor, *, tau: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of z + τ · log π; τ = 1 is balanced softmax. Predict with the raw logits z.

    Args:
        logits: (B, C) z.
        labels: (B,).
        log_prior: (C,) log π of `class_counts.log_prior`; for another target prior p_t than the
            uniform one, log π − log p_t (ECL, equation 3).
        tau: τ, any finite number; 0 is the cross-entropy.

    Raises:
        ValueError: tau is not finite, or a prior that is not one a class.

    Source: Balanced Meta-Softmax (arXiv 2007.10740), section 3; Logit Adjustment (Menon et al.,
    arXiv 2007.07314), equation 10.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).log()
        >>> logit_adjusted_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), uniform)
        tensor(0.6931)
    """
    return _mean(F.cross_entropy(adjusted_logits(logits, log_prior, tau), labels, reduction="none"))


def post_hoc_logits(
    logits: torch.Tensor, log_prior: torch.Tensor, *, tau: float = 1.0
) -> torch.Tensor:
    """The logits z − τ · log π, to predict with after training with plain cross-entropy.

    Args:
        logits: (B, C) z.
        log_prior: (C,) log π of `class_counts.log_prior`.
        tau: τ, any finite number; ECL finds 1.2 to 1.3 best for its experts.

    Raises:
        ValueError: tau is not finite, or a prior that is not one a class.

    Source: Logit Adjustment (Menon et al., arXiv 2007.07314), equation 9.

    Example:
        >>> prior = torch.tensor([0.75, 0.25]).log()
        >>> post_hoc_logits(torch.tensor([[1.0, 0.0]]), prior).argmax(1)
        tensor([1])
    """
    return adjusted_logits(logits, log_prior, -tau)


def label_aware_smoothing_loss(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy with a label smoothing of each class's own, as MiSLAS's code computes it.

    (1 − ε_y) · −log p_y + ε_y · mean_c −log p_c. The mean runs over all C classes, y included: the
    paper's formula leaves y out, its public code and results do not, and the code is followed.

    Args:
        logits: (B, C).
        labels: (B,).
        smoothing: (C,) ε of `smoothing_by_class`.

    Raises:
        ValueError: smoothing that is not one a class.

    Source: MiSLAS (arXiv 2104.00466), section 3.2.

    Example:
        >>> smoothing = torch.tensor([0.4, 0.0])
        >>> label_aware_smoothing_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), smoothing)
        tensor(0.5133)
    """
    _check_one_a_class("smoothing", smoothing, logits)
    losses = -F.log_softmax(widened(logits), dim=1)
    share = smoothing.to(losses.dtype)[labels]
    own = losses.gather(1, labels[:, None]).squeeze(1)
    return _mean(torch.lerp(own, losses.mean(1), share))


def balanced_bce_loss(
    logits: torch.Tensor, targets: torch.Tensor, log_odds: torch.Tensor
) -> torch.Tensor:
    """LiVT's balanced binary cross-entropy: summed over classes, the mean over images.

    Each class is a yes-or-no question with the logit z_c + log π_c − log(1 − π_c). Predict with the
    raw logits. The public code's factor τ has no effect there and is not offered.

    Args:
        logits: (B, C) z.
        targets: (B,) int64 labels, or (B, C) floating point shares in [0, 1] (mixup, smoothing).
        log_odds: (C,) of `class_counts.log_odds`.

    Raises:
        ValueError: shapes that do not fit.

    Source: LiVT (arXiv 2212.02015), balanced binary cross-entropy.

    Example:
        >>> loss = balanced_bce_loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(2))
        >>> loss  # 2 log 2
        tensor(1.3863)
    """
    _check_one_a_class("log_odds", log_odds, logits)
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[1])
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} are not allowed"
            f" (must be labels, or shares of shape {tuple(logits.shape)} as the logits)"
        )
    shifted = widened(logits) + log_odds
    losses = F.binary_cross_entropy_with_logits(
        shifted, targets.to(shifted.dtype), reduction="none"
    )
    return _mean(losses.sum(1))


def gml_loss(logits: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
    """Geometric mean loss: the mean over the batch's classes of −log of their mean probability.

    p_i is image i's probability of its true class under balanced softmax, at least 1e-5 (below it
    an image has no gradient, as in the public code), and m_c the mean of p_i over the batch's
    images of class c: the loss is −log of the geometric mean of the m_c, soft recalls. It retrains
    the classifier alone. The exponent of the public code is fixed at the 1 that it uses.

    Args:
        logits: (B, C).
        labels: (B,).
        log_prior: (C,) log π of `class_counts.log_prior`.

    Raises:
        ValueError: a prior that is not one a class.

    Source: GML as it ships in BTM's public code.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).log()
        >>> gml_loss(torch.zeros(3, 2), torch.tensor([0, 0, 1]), uniform)
        tensor(0.6931)
    """
    log_p = F.log_softmax(adjusted_logits(logits, log_prior, 1.0), dim=1)
    p = log_p.gather(1, labels[:, None]).squeeze(1).clamp(min=math.log(GML_FLOOR)).exp()
    images = p.new_zeros(logits.shape[1]).index_add(0, labels, torch.ones_like(p))
    recalls = p.new_zeros(logits.shape[1]).index_add(0, labels, p) / images.clamp(min=1)
    present = images > 0
    # `where` instead of an index: no synchronization with the device to learn which are present.
    return -torch.where(present, recalls, 1).log().sum() / present.sum().clamp(min=1)


def adjusted_logits(logits: torch.Tensor, log_prior: torch.Tensor, tau: float) -> torch.Tensor:
    """Wide z + τ · log π."""
    _check_one_a_class("log_prior", log_prior, logits)
    if not math.isfinite(tau):
        raise ValueError(f"tau = {tau} is not allowed (must be finite)")
    return widened(logits) + tau * log_prior


def widened(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(losses: torch.Tensor) -> torch.Tensor:
    """The mean; 0, still connected to the inputs, without images."""
    return losses.sum() / max(len(losses), 1)


def _check_one_a_class(name: str, values: torch.Tensor, logits: torch.Tensor) -> None:
    if values.shape != logits.shape[1:]:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} do not fit logits of shape"
            f" {tuple(logits.shape)} (must be one number a class)"
        )
