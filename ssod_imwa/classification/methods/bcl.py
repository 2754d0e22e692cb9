"""Balanced contrastive learning (BCL, Zhu et al., arXiv 2207.09052)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.balanced_softmax import logit_adjusted_loss
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.contrastive import balanced_contrastive_loss
from ssod_imwa.classification.methods.base import (
    ClassificationMethod,
    Training,
    TrainingNetwork,
    train_accuracy,
)
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.heads import projection_head
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch


@dataclass(frozen=True)
class BCLOptions(Options):
    """The two losses and the heads; the defaults are CIFAR's."""

    temperature: float = option(
        0.1, "T of the contrastive loss; 0.07 on large sets", above=0, per_member=True
    )
    ce_weight: float = option(
        2.0, "weight of the cross-entropy; 1 on large sets", low=0, per_member=True
    )
    contrastive_weight: float = option(
        0.6, "weight of the contrastive loss; 0.35 on large sets", low=0, per_member=True
    )
    hidden: int = option(512, "width inside both heads; that of the features on large sets", low=1)
    width: int = option(128, "width of projections and prototypes; 1024 on large sets", low=1)


class BCLOutputs(NamedTuple):
    """What BCL's losses need of B images in three views; rows of length 1.

    Attributes:
        logits: (B, C) of view 0.
        projections: (2B, width) of view 1, then of view 2.
        prototypes: (C, width), one of each class.
    """

    logits: torch.Tensor
    projections: torch.Tensor
    prototypes: torch.Tensor


class BCLNetwork(TrainingNetwork):
    """A classifier with two heads: one projects features, the other the classifier's weights.

    All views go through encoder and head together, so their batch norms see 3B images. The second
    head makes a prototype of each class (class complement) out of the weights that decide for it;
    the batch of its batch norm is the C classes.

    Args:
        deployed: a classifier with weights (C, d), linear or cosine.
        options: whose `hidden` and `width` are the heads'.

    Example:
        >>> from ssod_imwa.classification.models import CifarResNet
        >>> network = BCLNetwork(CifarResNet(10, depth=8, classifier="cosine"), BCLOptions())
        >>> view = torch.zeros(2, 3, 32, 32)
        >>> [tuple(output.shape) for output in network(view, view, view)]
        [(2, 10), (4, 128), (10, 128)]
        >>> network.eval()(view).shape
        torch.Size([2, 10])
    """

    deployed: ImageClassifier

    def __init__(self, deployed: ImageClassifier, options: BCLOptions) -> None:
        super().__init__(deployed)
        widths = (deployed.num_features, options.hidden, options.width)
        self.projection = projection_head("bcl", *widths)
        self.prototype_projection = projection_head("bcl", *widths)

    def outputs(self, *inputs: torch.Tensor) -> BCLOutputs:
        view0, view1, view2 = inputs
        features = self.deployed.features(torch.cat([view0, view1, view2]))
        # Of all 3B rows, as in the public code: the head's batch norm sees view 0, too.
        projections = self.projection(features)[len(view0) :]
        weights = self.deployed.classifier.get_parameter("weight")
        return BCLOutputs(
            self.deployed.classifier(features[: len(view0)]),
            F.normalize(widened(projections), dim=1),
            F.normalize(widened(self.prototype_projection(weights)), dim=1),
        )


class BalancedContrastive(ClassificationMethod):
    """Logit-adjusted cross-entropy on one view, balanced contrastive loss on two others.

    With the class prior π and T the temperature::

        L = λ CE(z(view 0) + log π, y) + μ L_BCL(views 1 and 2, prototypes; T)

    Args:
        student: the network.
        counts: training images of each class.
        options: T, λ (`ce_weight`) and μ (`contrastive_weight`).
        training: see `ClassificationMethod`.

    Raises:
        ValueError: a number is out of range, or counts are not one a class, or of one class alone.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image", "contrast_1", "contrast_2")}
    student: BCLNetwork

    def __init__(
        self,
        student: BCLNetwork,
        counts: Sequence[int],
        options: BCLOptions,
        *,
        training: Training,
    ) -> None:
        super().__init__(student, training)
        weights = student.deployed.classifier.get_parameter("weight")
        if len(counts) != len(weights):
            raise ValueError(
                f"{len(counts)} counts are not allowed (must be one for each of the network's "
                f"{len(weights)} classes)"
            )
        if len(counts) == 1:
            raise ValueError(
                "1 class is not allowed (must be at least 2: the batch norm of the prototypes' "
                "head sees the classes)"
            )
        self.options = options
        self.log_prior = log_prior(counts).to(weights.device)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        views, labels = batch["labeled"].views, batch["labeled"].targets
        logits, projections, prototypes = self.parallel_student(
            views["image"], views["contrast_1"], views["contrast_2"]
        )
        ce = logit_adjusted_loss(logits, labels, self.log_prior)
        # The same labels twice: view 2 follows view 1.
        contrastive = balanced_contrastive_loss(
            projections, labels.repeat(2), prototypes, temperature=self.options.temperature
        )
        # A weight of 0 keeps its loss in the graph: every parameter gets a gradient on every rank.
        return {
            "loss_ce": self.options.ce_weight * ce,
            "loss_contrastive": self.options.contrastive_weight * contrastive,
            "train_accuracy": train_accuracy(logits, labels),
        }
