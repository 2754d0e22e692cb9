"""Cross-entropy, torch's own, with class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.base import Criterion, widened
from ssod_imwa.classification.losses.class_weights import ClassWeights, WeightedOptions
from ssod_imwa.config.options import option


@dataclass(frozen=True)
class CrossEntropyOptions(WeightedOptions):
    """Class weights and smoothing."""

    smoothing: float = option(0.0, "label smoothing, of all classes alike", low=0, below=1)


class CrossEntropy(Criterion):
    """Cross-entropy; with weights the mean divides by those of the batch, as torch's does."""

    name = "cross_entropy"
    options_class = CrossEntropyOptions

    def __init__(self, counts: Sequence[int], options: CrossEntropyOptions) -> None:
        super().__init__(counts, options)
        self.weights = ClassWeights(counts, options)
        self.smoothing = options.smoothing

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
