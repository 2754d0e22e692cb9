"""Nested collaborative learning for long-tailed recognition (NCL, Li et al., arXiv 2203.15359)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import checked_counts
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.collaborative import (
    hard_category_mask,
    masked_logits,
    nested_distillation_loss,
)
from ssod_imwa.classification.methods.base import Training, train_accuracy
from ssod_imwa.classification.methods.collaborative import Collaborative
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.moco import ExpertContrast
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch


@dataclass(frozen=True)
class NCLOptions(Options):
    """The losses beside cross-entropy."""

    hard_categories: int = option(
        0, "classes that an image is compared on, its own included; 0 takes 0.3 of them", low=0
    )
    distillation_weight: float = option(0.6, "weight of both distillations", low=0, per_member=True)
    contrastive_weight: float = option(
        1.0, "weight of the contrastive losses; 0 trains without MoCo and its second view", low=0
    )


class NCL(Collaborative):
    """Experts that learn labels and one another, over all classes and over the hard ones.

    For K experts with logits z, n the images of each class, a^k = z^k + log n and h^k = a^k where
    expert 0 mistakes most and 0 elsewhere::

        L = Σ_k [CE(a^k, y) + CE(h^k, y)] + λ [D(a) + D(h)] + β Σ_k InfoNCE_k

    These are sums over experts, not means: with more experts each learns at the same rate.

    Args:
        student: the network.
        counts: training images of each class.
        options: λ (`distillation_weight`), β (`contrastive_weight`; of no account without
            `contrast`, as in the public recipes for ImageNet-LT and iNaturalist) and the number of
            hard categories: 30 of CIFAR-100, 300 of ImageNet-LT.
        training: see `ClassificationMethod`.
        contrast: MoCo beside the experts, see `Collaborative`.

    Raises:
        ValueError: there are fewer classes than hard categories, or the network does not fit.
    """

    def __init__(
        self,
        student: CollaborativeNetwork,
        counts: Sequence[int],
        options: NCLOptions,
        *,
        training: Training,
        contrast: ExpertContrast | None = None,
    ) -> None:
        super().__init__(student, counts, training=training, contrast=contrast)
        if student.references is not None:
            raise ValueError("reference heads are not allowed (NCL would give them no gradient)")
        classes = len(counts)
        if options.hard_categories > classes:
            raise ValueError(
                f"hard_categories = {options.hard_categories} is not allowed (must be at most C = "
                f"{classes})"
            )
        self.hard_categories = options.hard_categories or max(1, 3 * classes // 10)
        self.options = options
        # log n, not log π: beside the masked logits of 0 a constant counts.
        self.log_counts = checked_counts(counts).log().float().to(next(student.parameters()).device)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        labels = batch["labeled"].targets
        outputs = self.parallel_student(batch["labeled"].views["image"])
        compensated = widened(outputs.logits) + self.log_counts
        mask = hard_category_mask(outputs.logits[0], labels, count=self.hard_categories)
        hard = masked_logits(compensated, mask)
        weight = self.options.distillation_weight
        return {
            "loss_ce": _summed_cross_entropy(compensated, labels),
            "loss_ce_hard": _summed_cross_entropy(hard, labels),
            "loss_kd": weight * nested_distillation_loss(compensated),
            "loss_kd_hard": weight * nested_distillation_loss(hard),
            **self._contrastive(outputs, batch, t, weight=self.options.contrastive_weight),
            "train_accuracy": train_accuracy(outputs.logits.mean(0), labels),
        }


def _summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over experts of the mean over images."""
    experts = len(logits)
    return experts * F.cross_entropy(logits.flatten(0, 1), labels.repeat(experts))
