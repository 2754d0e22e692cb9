"""Geometric mean loss, as it ships in BTM's public code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.balanced_softmax import adjusted_logits
from ssod_imwa.classification.losses.base import Criterion
from ssod_imwa.config.options import Options

GML_FLOOR = 1e-5  # least probability of the true class in GML's public code


def gml_loss(logits: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor) -> torch.Tensor:
    """Geometric mean loss: the mean over the batch's classes of −log of their mean probability.

    p_i is image i's probability of its true class under balanced softmax, at least 1e-5 (below it
    an image has no gradient, as in the public code), and m_c the mean of p_i over the batch's
    images of class c: the loss is −log of the geometric mean of the m_c, soft recalls. It retrains
    the classifier alone. The exponent of the public code is fixed at the 1 that it uses.

    Args:
        logits: (B, C).
        labels: (B,).
        log_prior: (C,) log π of `class_counts.log_prior`.

    Raises:
        ValueError: a prior that is not one a class.

    Source: GML as it ships in BTM's public code.

    Example:
        >>> uniform = torch.tensor([0.5, 0.5]).log()
        >>> gml_loss(torch.zeros(3, 2), torch.tensor([0, 0, 1]), uniform)
        tensor(0.6931)
    """
    log_p = F.log_softmax(adjusted_logits(logits, log_prior, 1.0), dim=1)
    p = log_p.gather(1, labels[:, None]).squeeze(1).clamp(min=math.log(GML_FLOOR)).exp()
    images = p.new_zeros(logits.shape[1]).index_add(0, labels, torch.ones_like(p))
    recalls = p.new_zeros(logits.shape[1]).index_add(0, labels, p) / images.clamp(min=1)
    present = images > 0
    # `where` instead of an index: no synchronization with the device to learn which are present.
    return -torch.where(present, recalls, 1).log().sum() / present.sum().clamp(min=1)


class GML(Criterion):
    """The geometric mean loss; it has no options."""

    name = "gml"
    log_prior: torch.Tensor

    def __init__(self, counts: Sequence[int], options: Options) -> None:
        super().__init__(counts, options)
        self._keep("log_prior", log_prior(counts))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        return gml_loss(logits, targets, self.log_prior)
