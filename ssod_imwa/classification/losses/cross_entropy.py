"""Cross-entropy, torch's own, with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.base import Criterion, SmoothedOptions, widened
from ssod_imwa.classification.losses.class_weights import ClassWeights, WeightedOptions


@dataclass(frozen=True)
class CrossEntropyOptions(WeightedOptions, SmoothedOptions):
    """Class weights and smoothing."""


def weighted_cross_entropy(
    logits: torch.Tensor, shares: torch.Tensor, weight: torch.Tensor, *, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy with class weights of shares of classes, as mixed images have them.

    The sum over images and classes of w_c t_c · −log p_c, divided by that of w_c t_c: torch's own
    for shares that are labels, and for mixup what the usual λ CE(y_a) + (1 − λ) CE(y_b) is, since
    both labels of a batch have the same weights in sum. (Torch's own for shares divides by B.)

    Args:
        logits: (B, C).
        shares: (B, C) t, of the logits' type.
        weight: (C,) w, DRW's.
        smoothing: part of each share that goes to all classes alike.

    Source: Remix (Chou et al., arXiv 2007.03943) with deferred re-weighting (arXiv 1906.07413).

    Example:
        >>> even, weight = torch.tensor([[0.5, 0.5]]), torch.tensor([3.0, 1.0])
        >>> weighted_cross_entropy(torch.zeros(1, 2), even, weight)
        tensor(0.6931)
    """
    loss = F.cross_entropy(
        logits, shares, weight=weight, reduction="sum", label_smoothing=smoothing
    )
    return loss / (shares @ weight).sum()


class CrossEntropy(Criterion):
    """Cross-entropy; with weights the mean divides by those of the batch, as torch's does."""

    name = "cross_entropy"
    options_class = CrossEntropyOptions
    takes_shares = True

    def __init__(self, counts: Sequence[int], options: CrossEntropyOptions) -> None:
        super().__init__(counts, options)
        self.weights = ClassWeights(counts, options)
        self.smoothing = options.of_all_classes()

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        logits, weights = widened(logits), self.weights(progress)
        if weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        weights = weights.to(logits.dtype)
        if targets.dim() == 2:
            shares = targets.to(logits.dtype)
            return weighted_cross_entropy(logits, shares, weights, smoothing=self.smoothing)
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=self.smoothing)
