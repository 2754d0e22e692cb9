"""FixMatch's own rule (Sohn et al., arXiv 2001.07685, equation 4)."""

from __future__ import annotations

from ssod_imwa.classification.labelers.base import (
    Labeler,
    PseudoLabels,
    ThresholdOptions,
    WeakOutputs,
    thresholded,
)


class Threshold(Labeler):
    """The class that the weak view is predicted as, if max σ(z) is at least ρ.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[4.0, 0.0], [1.0, 0.0]])
        >>> weak = WeakOutputs(logits, torch.zeros(2, 1), torch.arange(2))
        >>> Threshold(ThresholdOptions()).label(weak, 0).mask
        tensor([ True, False])
    """

    name = "threshold"
    options_class = ThresholdOptions

    def __init__(self, options: ThresholdOptions) -> None:
        self.options = options

    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        probabilities = weak.logits.softmax(1)
        return PseudoLabels(*thresholded(probabilities, self.options.threshold), probabilities, {})
