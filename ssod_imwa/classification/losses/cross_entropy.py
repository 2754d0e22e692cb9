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


class CrossEntropy(Criterion):
    """Cross-entropy; with weights the mean divides by those of the batch, as torch's does."""

    name = "cross_entropy"
    options_class = CrossEntropyOptions

    def __init__(self, counts: Sequence[int], options: CrossEntropyOptions) -> None:
        super().__init__(counts, options)
        self.weights = ClassWeights(counts, options)
        self.smoothing = options.of_all_classes()

    @property
    def takes_shares(self) -> bool:
        return self.weights.weights is None

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        logits, weights = widened(logits), self.weights(progress)
        return F.cross_entropy(
            logits,
            targets,
            weight=None if weights is None else weights.to(logits.dtype),
            label_smoothing=self.smoothing,
        )
