"""Focal loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_at_least_0
from ssod_imwa.classification.losses.base import Criterion, mean_over_images, widened
from ssod_imwa.config.options import Options, option


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
    check_at_least_0(gamma=gamma)
    cross_entropy = F.cross_entropy(widened(logits), labels, reduction="none")
    # expm1 keeps the digits of 1 - p where p is near 1; the clamp keeps the gradient of its power
    # finite at p = 1, where the limit is 0 but γ < 1 computes infinity times 0.
    missing = (-torch.expm1(-cross_entropy)).clamp(min=torch.finfo(cross_entropy.dtype).tiny)
    return mean_over_images(missing**gamma * cross_entropy)


@dataclass(frozen=True)
class FocalOptions(Options):
    """The exponent."""

    gamma: float = option(1.0, "exponent of the factor 1 - p; 0 is the cross-entropy", low=0)


class Focal(Criterion):
    """The focal loss."""

    name = "focal"
    options_class = FocalOptions

    def __init__(self, counts: Sequence[int], options: FocalOptions) -> None:
        super().__init__(counts, options)
        self.gamma = options.gamma

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        return focal_loss(logits, targets, gamma=self.gamma)
