"""Label-distribution-aware margin loss (LDAM, Cao et al., arXiv 1906.07413)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_above_0
from ssod_imwa.classification.class_counts import ldam_margins
from ssod_imwa.classification.losses.base import Criterion, check_one_a_class, widened
from ssod_imwa.classification.losses.class_weights import ClassWeights, WeightedOptions
from ssod_imwa.config.options import option


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
    check_above_0(scale=scale)
    check_one_a_class("margins", margins, cosines)
    cosines = widened(cosines)
    margin = margins.to(cosines.dtype)[labels]
    shifted = cosines.scatter_add(1, labels[:, None], -margin[:, None])
    if len(labels) == 0:
        return shifted.sum()  # torch's mean of nothing is nan
    if weight is not None:
        weight = weight.to(cosines.dtype)
    return F.cross_entropy(scale * shifted, labels, weight=weight)


@dataclass(frozen=True)
class LDAMOptions(WeightedOptions):
    """Margins, scale and class weights."""

    margin: float = option(0.5, "margin of the rarest class, in cosine units", low=0)
    scale: float = option(30.0, "factor of the cosines, in place of the classifier's", above=0)


class LDAM(Criterion):
    """LDAM; with weights from 0.8 of the training LDAM-DRW."""

    name = "ldam"
    options_class = LDAMOptions
    of_cosines = True
    margins: torch.Tensor

    def __init__(self, counts: Sequence[int], options: LDAMOptions) -> None:
        super().__init__(counts, options)
        self.weights = ClassWeights(counts, options)
        self.scale = options.scale
        self._keep("margins", ldam_margins(counts, largest=options.margin))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        weight = self.weights(progress)
        return ldam_loss(logits, targets, self.margins, scale=self.scale, weight=weight)
