"""Balanced binary cross-entropy (LiVT, Xu et al., arXiv 2212.02015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_odds
from ssod_imwa.classification.losses.base import (
    Criterion,
    SmoothedOptions,
    check_one_a_class,
    mean_over_images,
    widened,
)


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
    check_one_a_class("log_odds", log_odds, logits)
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
    return mean_over_images(losses.sum(1))


class BalancedBCE(Criterion):
    """A yes-or-no question for each class, of labels or shares, smoothed."""

    name = "balanced_bce"
    options_class = SmoothedOptions
    takes_shares = True
    log_odds: torch.Tensor

    def __init__(self, counts: Sequence[int], options: SmoothedOptions) -> None:
        super().__init__(counts, options)
        self.smoothing = options.of_all_classes()
        self._keep("log_odds", log_odds(counts))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1])
        # Not in the logits' type: in half precision the shares would be off by up to 4e-3.
        logits = widened(logits)
        even = torch.full_like(logits, 1 / logits.shape[1])
        smoothed = targets.to(logits.dtype).lerp(even, self.smoothing)
        return balanced_bce_loss(logits, smoothed, self.log_odds)
