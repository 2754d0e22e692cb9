"""Balanced softmax and logit adjustment: logits shifted by the log prior of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.base import (
    Criterion,
    SmoothedOptions,
    check_one_a_class,
    mean_over_images,
    widened,
)
from ssod_imwa.config.options import option


def logit_adjusted_loss(
    logits: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor, *, tau: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of z + τ · log π; τ = 1 is balanced softmax. Predict with the raw logits z.

    Args:
        logits: (B, C) z.
        labels: (B,).
        log_prior: (C,) log π of `class_counts.log_prior`; for another target prior p_t than the
            uniform one, log π − log p_t (ECL, equation 3).
        tau: τ, any finite number; 0 is the cross-entropy.

    Raises:
        ValueError: tau is not finite, or a prior that is not one a class.

    Source: Balanced Meta-Softmax (arXiv 2007.10740), section 3; Logit Adjustment (Menon et al.,
    arXiv 2007.07314), equation 10.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).log()
        >>> logit_adjusted_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), uniform)
        tensor(0.6931)
    """
    return mean_over_images(
        F.cross_entropy(adjusted_logits(logits, log_prior, tau), labels, reduction="none")
    )


def post_hoc_logits(
    logits: torch.Tensor, log_prior: torch.Tensor, *, tau: float = 1.0
) -> torch.Tensor:
    """The logits z − τ · log π, to predict with after training with plain cross-entropy.

    Args:
        logits: (B, C) z.
        log_prior: (C,) log π of `class_counts.log_prior`.
        tau: τ, any finite number; ECL finds 1.2 to 1.3 best for its experts.

    Raises:
        ValueError: tau is not finite, or a prior that is not one a class.

    Source: Logit Adjustment (Menon et al., arXiv 2007.07314), equation 9.

    Example:
        >>> prior = torch.tensor([0.75, 0.25]).log()
        >>> post_hoc_logits(torch.tensor([[1.0, 0.0]]), prior).argmax(1)
        tensor([1])
    """
    return adjusted_logits(logits, log_prior, -tau)


def adjusted_logits(logits: torch.Tensor, log_prior: torch.Tensor, tau: float) -> torch.Tensor:
    """Wide z + τ · log π."""
    check_one_a_class("log_prior", log_prior, logits)
    if not math.isfinite(tau):
        raise ValueError(f"tau = {tau} is not allowed (must be finite)")
    return widened(logits) + tau * log_prior


@dataclass(frozen=True)
class BalancedSoftmaxOptions(SmoothedOptions):
    """Strength of the prior, and smoothing."""

    tau: float = option(1.0, "factor of the log prior; 0 is the cross-entropy")


class BalancedSoftmax(Criterion):
    """Cross-entropy of the adjusted logits; predict with the raw ones."""

    name = "balanced_softmax"
    options_class = BalancedSoftmaxOptions
    takes_shares = True
    log_prior: torch.Tensor

    def __init__(self, counts: Sequence[int], options: BalancedSoftmaxOptions) -> None:
        super().__init__(counts, options)
        self.tau = options.tau
        self.smoothing = options.of_all_classes()
        self._keep("log_prior", log_prior(counts))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        adjusted = adjusted_logits(logits, self.log_prior, self.tau)
        return F.cross_entropy(adjusted, targets, label_smoothing=self.smoothing)
