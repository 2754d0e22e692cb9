"""Weights of classes in a loss, from the start of the training or deferred (DRW)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ssod_imwa.classification.class_counts import deferred_weights, effective_number_weights
from ssod_imwa.config.options import Options, Switch, option

WEIGHTED = Switch("other than 'none'", lambda value: value != "none")


@dataclass(frozen=True)
class WeightedOptions(Options):
    """Of a loss that takes class weights."""

    weights: Literal["none", "effective_number"] = option(
        "none", "weights of classes: none, or by the effective number of their images"
    )
    beta: float = option(
        0.9999, "parameter of the effective numbers", low=0, below=1, when={"weights": WEIGHTED}
    )
    weights_from: float = option(
        0.0,
        "part of the training after which the weights count; 0.8 is DRW's",
        low=0,
        high=1,
        when={"weights": WEIGHTED},
    )


class ClassWeights(nn.Module):
    """The weights (C,) that count at some progress of training; None without weights.

    Args:
        counts: training images of each class.
        options: which weights, and from when.

    Example:
        >>> weights = ClassWeights([1, 2], WeightedOptions("effective_number", beta=0.5))
        >>> weights(progress=0.0)
        tensor([1.2000, 0.8000])
    """

    weights: torch.Tensor | None

    def __init__(self, counts: Sequence[int], options: WeightedOptions) -> None:
        super().__init__()
        self.start = options.weights_from
        weights = None
        if options.weights == "effective_number":
            weights = effective_number_weights(counts, beta=options.beta)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, progress: float) -> torch.Tensor | None:
        if self.weights is None:
            return None
        return deferred_weights(self.weights, progress=progress, start=self.start)
