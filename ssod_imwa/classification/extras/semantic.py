"""DASO's semantic alignment (Oh et al., arXiv 2106.05682, equation 6)."""

from __future__ import annotations

import torch

from ssod_imwa.classification.extras.base import Extra, Step, masked_cross_entropy
from ssod_imwa.classification.labelers.daso import DASO


class SemanticAlignment(Extra):
    """The strong view is to be as near to each prototype as the weak view is.

    L = mean CE(q(strong), q(weak)) with q = σ(cos(f, c) / T_proto), all images whatever their
    confidence; no gradient goes into q(weak) or the prototypes. 0 before the end of the warm-up.

    Args:
        labeler: whose prototypes and warm-up it shares.
        weight: of the loss.
    """

    def __init__(self, labeler: DASO, *, weight: float) -> None:
        self.labeler = labeler
        self.weight = weight

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        prototypes = self.labeler.prototypes
        targets = prototypes.similarity_logits(step.weak.features).softmax(1)
        logits = prototypes.similarity_logits(step.strong.features)
        loss = masked_cross_entropy(logits, targets, torch.ones_like(targets[:, 0]))
        # 0 keeps its loss in the graph: every parameter gets a gradient on every rank.
        return {"loss_semantic": loss * (self.weight * self.labeler.is_active(step.t))}
