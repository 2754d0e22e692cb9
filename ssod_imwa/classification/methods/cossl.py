"""CoSSL: a classifier and its encoder that learn from each other (Fan et al., arXiv 2112.04564)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import checked_counts
from ssod_imwa.classification.extras.base import masked_cross_entropy
from ssod_imwa.classification.labelers.base import PseudoLabels, ThresholdOptions, thresholded
from ssod_imwa.classification.labelers.records import count_labels, label_records
from ssod_imwa.classification.losses.base import Criterion, widened
from ssod_imwa.classification.methods.base import (
    ClassificationMethod,
    Training,
    TrainingNetwork,
    train_accuracy,
)
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.config.options import option
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.teacher import Teacher


@dataclass(frozen=True)
class CoSSLOptions(ThresholdOptions):
    """The two branches, and the features that the head is trained on."""

    warmup_iters: int = option(
        5000, "iterations in which the new head alone is trained", low=0, iterations=True
    )
    unsup_loss_weight: float = option(
        1.0, "λ_u, weight of the loss on pseudo-labels", low=0, per_member=True
    )
    least_share: float = option(
        0.6,
        "least share of the labeled feature in a mixed one; 0.6 in the scripts, 0.8 by default in "
        "the public code",
        low=0,
        high=1,
        per_member=True,
    )


class CoSSLOutputs(NamedTuple):
    """What the losses need.

    Attributes:
        logits: (N, C) of images by the encoder's own classifier; None where only the head learns.
        head_logits: (M, C) of features by the head.
    """

    logits: torch.Tensor | None
    head_logits: torch.Tensor


class CoSSLNetwork(TrainingNetwork):
    """A trained classifier whose own classifier becomes the encoder's, and a new head in its place.

    The deployed classifier is the encoder with the head: with both as averages, what is tested.

    Args:
        deployed: the classifier that FixMatch has trained.

    Example:
        >>> from ssod_imwa.classification.models import WideResNet
        >>> network = CoSSLNetwork(WideResNet(10, depth=10, width=1))
        >>> outputs = network(torch.zeros(4, 64), torch.zeros(2, 3, 32, 32))
        >>> outputs.logits.shape, outputs.head_logits.shape
        (torch.Size([2, 10]), torch.Size([4, 10]))
    """

    deployed: ImageClassifier

    def __init__(self, deployed: ImageClassifier) -> None:
        super().__init__(deployed)
        self.base_head = copy.deepcopy(deployed.classifier)
        deployed.redraw(deployed.classifier)

    def outputs(self, *inputs: torch.Tensor) -> CoSSLOutputs:
        features, *images = inputs
        logits = self.base_head(self.deployed.features(images[0])) if images else None
        return CoSSLOutputs(logits, self.deployed.classifier(features))


class CoSSL(ClassificationMethod):
    """A balanced head on the teacher's features labels images for the encoder, FixMatch's way.

    With the teacher's features f̄ in eval mode, the head h, and the base head z on the student's::

        L_h = CE(h(x̃), y)           x̃ of f̄(balanced labeled images), see `enhanced_features`
        L_s = CE(z(x), y),  L_u = mean [max q ≥ ρ] CE(z(strong), argmax q),  q = σ(h(f̄(weak)))

    L = L_h in the warm-up, in which nothing but the head changes, then L_h + L_s + λ_u L_u. The
    teacher's head on the teacher's encoder is tested.

    Args:
        student: the network, whose encoder a stage of FixMatch has trained.
        counts: labeled images of each class.
        criterion: L_s.
        options: see there.
        training: see `ClassificationMethod`; with a teacher.
        knows_truth: as FixMatch's.

    Raises:
        ValueError: a number is out of range, or there is no teacher.
    """

    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak",),
        "unlabeled": ("weak", "strong_1", "strong_2"),
        "balanced": ("strong",),
    }
    student: CoSSLNetwork
    teacher: Teacher[CoSSLNetwork]

    def __init__(
        self,
        student: CoSSLNetwork,
        counts: Sequence[int],
        criterion: Criterion,
        options: CoSSLOptions,
        *,
        training: Training,
        knows_truth: bool = False,
    ) -> None:
        if training.ema_decay == 0:
            raise ValueError("ema_decay = 0 is not allowed (must be above 0: it is the teacher's)")
        super().__init__(student, training)
        device = next(student.parameters()).device
        self.options = options
        self.knows_truth = knows_truth
        self.criterion = criterion.to(device)
        self.mixing_rates = mixing_rates(counts).to(device)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        balanced, unlabeled = batch["balanced"], batch["unlabeled"]
        mixed = enhanced_features(
            self._features(balanced.views["strong"]),
            balanced.targets,
            self._features(unlabeled.views["strong_1"]),
            rates=self.mixing_rates,
            least_share=self.options.least_share,
        )
        if t < self.options.warmup_iters:
            if self.ranks.batch.size > 1:
                raise ValueError(
                    "warmup_iters > 0 is not allowed on several processes (must be 0: they "
                    "exchange gradients of all parameters)"
                )
            head_logits = self.parallel_student(mixed).head_logits
            return {"loss_head": F.cross_entropy(widened(head_logits), balanced.targets)}
        return self._co_learning(batch, mixed, t)

    def _co_learning(self, batch: Batch, mixed: torch.Tensor, t: int) -> dict[str, torch.Tensor]:
        labeled, views = batch["labeled"], batch["unlabeled"].views
        weak = self._features(views["weak"])
        images = torch.cat([labeled.views["weak"], views["strong_1"], views["strong_2"]])
        outputs = self.parallel_student(torch.cat([mixed, weak]), images)
        head_logits = widened(outputs.head_logits)
        pseudo_labels = self._label(head_logits[len(mixed) :].detach())
        logits, strong = outputs.logits.split([len(labeled), len(images) - len(labeled)])
        unlabeled = masked_cross_entropy(strong, pseudo_labels.targets, pseudo_labels.mask)
        if self.label_statistics is not None:
            truth = batch["unlabeled"].targets if self.knows_truth else None
            count_labels(self.label_statistics, pseudo_labels, truth)
        return {
            "loss_head": F.cross_entropy(head_logits[: len(mixed)], batch["balanced"].targets),
            "loss_labeled": self.criterion(logits, labeled.targets, progress=self.progress(t)),
            "loss_unlabeled": self.options.unsup_loss_weight * unlabeled,
            "train_accuracy": train_accuracy(logits, labeled.targets),
            **label_records(pseudo_labels),
        }

    def _label(self, logits: torch.Tensor) -> PseudoLabels:
        probabilities = logits.softmax(1)
        return PseudoLabels(*thresholded(probabilities, self.options.threshold), probabilities, {})

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's features (B, d), in eval mode."""
        return widened(self.teacher.model.deployed.features(images))


def mixing_rates(counts: Sequence[int]) -> torch.Tensor:
    """P (C,) = (N_1 − N_y) / N_1: how often features of a class are mixed, the rarer the oftener.

    Example:
        >>> mixing_rates([4, 1])
        tensor([0.0000, 0.7500])
    """
    checked = checked_counts(counts)
    return (1 - checked / checked.max()).float()


def enhanced_features(
    features: torch.Tensor,
    labels: torch.Tensor,
    others: torch.Tensor,
    *,
    rates: torch.Tensor,
    least_share: float,
) -> torch.Tensor:
    """Features (B, d), some of which are mixed with those of other images; labels stay.

    With probability P_y a feature x becomes λ x + (1 − λ) u, λ uniform in least_share..1; both
    draws are from the global generator.

    Args:
        features: (B, d) of images of classes drawn equally often.
        labels: int64 (B,).
        others: (n, d) of images drawn equally often; image i takes number i mod n.
        rates: P (C,) of `mixing_rates`.
        least_share: of λ.

    Source: CoSSL, section 3.3, tail-class feature enhancement.
    """
    images = len(features)
    is_mixed = torch.bernoulli(rates[labels])[:, None]
    share = least_share + (1 - least_share) * torch.rand(images, 1, device=features.device)
    partners = others[torch.arange(images, device=others.device) % len(others)]
    return features + is_mixed * (1 - share) * (partners - features)
