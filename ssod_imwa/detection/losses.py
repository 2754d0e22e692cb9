"""Loss functions of detectors, without state."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def multiclass_focal_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, gamma: float
) -> torch.Tensor:
    """Unbiased Teacher's focal loss: the mean over rows of (1 - p_y)^gamma * -log p_y.

    p is the softmax over all classes, background included, and there is no class weight, unlike in
    the sigmoid focal loss of RetinaNet. gamma = 0 is the cross-entropy.

    Args:
        logits: (R, classes) floating point.
        labels: (R,) int64, the assigned class of each row.
        gamma: 0, or at least 1 (between, the gradient is infinite where p_y = 1).

    Returns:
        A scalar; 0 without rows.

    Raises:
        ValueError: gamma is out of range.

    Source: Unbiased Teacher (arXiv 2102.09480), section 3.3, in its public code's form.

    Example:
        >>> multiclass_focal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), gamma=1.0)
        tensor(0.3466)
    """
    check_gamma(gamma)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    # expm1 keeps the digits of 1 - p where p is near 1.
    missing = -torch.expm1(-cross_entropy)
    return (missing**gamma * cross_entropy).sum() / max(len(labels), 1)


def weighted_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Soft Teacher's classification loss: sum_r w_r * -log p_y / max(sum_r w_r, 1).

    p is the softmax over all classes, background included. No gradient flows through the weights.
    With weights of 1 it is the mean cross-entropy.

    Args:
        logits: (R, classes) floating point.
        labels: (R,) int64, the assigned class of each row.
        weights: (R,), at least 0.

    Returns:
        A scalar; 0 without rows.

    Source: Soft Teacher (arXiv 2106.09018), equations 5 and 6, in its public code's form.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
        >>> weighted_cross_entropy(logits, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        tensor(0.6931)
    """
    weights = weights.detach()
    terms = weights * F.cross_entropy(logits, labels, reduction="none")
    return terms.sum() / weights.sum().clamp(min=1)


def check_gamma(gamma: float) -> None:
    """Raise ValueError unless gamma is one that `multiclass_focal_loss` takes."""
    if gamma != 0 and not 1 <= gamma < float("inf"):
        raise ValueError(f"gamma = {gamma} is not allowed (must be 0 or at least 1)")


def box_loss(
    deltas: torch.Tensor, targets: torch.Tensor, *, divisor: int, beta: float
) -> torch.Tensor:
    """The smooth-L1 distances of box deltas, summed over everything and divided.

    Args:
        deltas: (n, 4) predicted offsets of the positive boxes alone.
        targets: (n, 4) offsets to learn.
        divisor: detectron2's normalizer, the number of all sampled boxes; 0 counts as 1.
        beta: width of the quadratic part in target units; 0 is the L1 distance.

    Returns:
        A scalar; 0, still connected to `deltas`, when n = 0.

    Example:
        >>> box_loss(torch.zeros(1, 4), torch.ones(1, 4), divisor=8, beta=0.0)
        tensor(0.5000)
    """
    return F.smooth_l1_loss(deltas, targets, beta=beta, reduction="sum") / max(divisor, 1)


def quality_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, beta: float = 2.0
) -> torch.Tensor:
    """|q - p|^beta * BCE(p, q) of p = sigmoid(logits) and soft targets q, for each element.

    The gradient flows through both factors.

    Args:
        logits: floating point.
        targets: of the same shape, in [0, 1]; 0 makes it the focal loss of background.
        beta: at least 1.

    Returns:
        Of the same shape; 0 where p = q = 0 or p = q = 1, and everywhere where p = q.

    Source: Generalized Focal Loss (Li et al., arXiv 2006.04388, equation 2), as Dense Teacher takes
    it.

    Example:
        >>> quality_focal_loss(torch.tensor([0.0, 0.0]), torch.tensor([0.5, 0.0]))
        tensor([0.0000, 0.1733])
    """
    distance = (targets - logits.sigmoid()).abs()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return distance**beta * cross_entropy


def aligned_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The IoU of each box (n, 4) with the box (n, 4) in the same row, in [0, 1]; 0 without areas.

    Example:
        >>> aligned_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
        tensor([0.3333])
    """
    top_left = torch.maximum(boxes[:, :2], others[:, :2])
    bottom_right = torch.minimum(boxes[:, 2:], others[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)
