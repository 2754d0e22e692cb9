"""Label-aware smoothing, MiSLAS's second stage (Zhong et al., arXiv 2104.00466)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import smoothing_by_class
from ssod_imwa.classification.losses.base import (
    Criterion,
    SmoothedOptions,
    check_one_a_class,
    mean_over_images,
    widened,
)


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
    check_one_a_class("smoothing", smoothing, logits)
    losses = -F.log_softmax(widened(logits), dim=1)
    share = smoothing.to(losses.dtype)[labels]
    of_label = losses.gather(1, labels[:, None]).squeeze(1)
    return mean_over_images(torch.lerp(of_label, losses.mean(1), share))


class LabelAwareSmoothing(Criterion):
    """Cross-entropy that is the more smoothed, the more frequent a class is.

    Raises:
        ValueError: smoothing that is not two numbers, or grows towards the rare classes.
    """

    name = "label_aware_smoothing"
    options_class = SmoothedOptions
    smoothing: torch.Tensor

    def __init__(self, counts: Sequence[int], options: SmoothedOptions) -> None:
        super().__init__(counts, options)
        if len(options.smoothing) != 2:
            raise ValueError(
                f"smoothing = {options.smoothing} is not allowed (must be two numbers: of the most "
                "and of the least frequent class)"
            )
        head, tail = options.smoothing
        self._keep("smoothing", smoothing_by_class(counts, head=head, tail=tail))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        return label_aware_smoothing_loss(logits, targets, self.smoothing)
