"""Parametric contrastive learning: PaCo (Cui et al., arXiv 2107.12028) and GPaCo (2209.12400)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.contrastive import parametric_contrastive_loss
from ssod_imwa.classification.methods.base import (
    ClassificationMethod,
    Training,
    TrainingNetwork,
    train_accuracy,
)
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.feature_queue import FeatureQueue
from ssod_imwa.classification.models.freezing import set_train_mode
from ssod_imwa.classification.models.heads import projection_head
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.teacher import Teacher
from ssod_imwa.errors import ConfigError


@dataclass(frozen=True)
class GPaCoOptions(Options):
    """The loss, the queue and the head; the defaults are PaCo's on CIFAR."""

    alpha: float = option(
        0.01,
        "weight of a sample beside the 1 of its class; 0.02 to 0.05 on large sets",
        low=0,
        per_member=True,
    )
    temperature: float = option(
        0.05, "T of the samples; 0.07 or 0.2 on large sets", above=0, per_member=True
    )
    queue: int = option(1024, "rows of the queue, at least a batch; 8192 on large sets", low=1)
    hidden: int = option(0, "width inside the head; 0 takes that of the features", low=0)
    width: int = option(32, "width of projections; 128 on large sets", low=1)


@dataclass(frozen=True)
class PaCoOptions(GPaCoOptions):
    """And the slow network."""

    momentum: float = option(0.999, "momentum of the slow network", low=0, high=1, decay=True)


class ParametricNetwork(TrainingNetwork):
    """A classifier with a head that projects its features.

    Views given together go through the encoder one after the other, as in GPaCo's code: a batch
    norm sees one view at a time.

    Args:
        deployed: the classifier.
        head: "paco" or "gpaco", see `projection_head`.
        options: whose `hidden` and `width` are the head's.

    Example:
        >>> from ssod_imwa.classification.models import CifarResNet
        >>> network = ParametricNetwork(CifarResNet(10, depth=8), PaCoOptions(), head="paco")
        >>> logits, projections = network(torch.zeros(2, 3, 32, 32))
        >>> logits.shape, projections.shape
        (torch.Size([2, 10]), torch.Size([2, 32]))
    """

    deployed: ImageClassifier

    def __init__(
        self,
        deployed: ImageClassifier,
        options: GPaCoOptions,
        *,
        head: Literal["paco", "gpaco"],
    ) -> None:
        super().__init__(deployed)
        d = deployed.num_features
        self.projection = projection_head(head, d, options.hidden or d, options.width)

    def outputs(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (nB, C) and projections (nB, width), rows of length 1, of n views in turn."""
        features = torch.cat([self.deployed.features(view) for view in views])
        projections = F.normalize(widened(self.projection(features)), dim=1)
        return self.deployed.classifier(features), projections


class ParametricContrastive(ClassificationMethod):
    """What PaCo and GPaCo share: the loss, and the queue of earlier features with their labels.

    Args:
        student: the network.
        counts: training images of each class.
        options: α, T and the queue, which begins with random directions of no class.
        training: see `ClassificationMethod`.
        seed: of the queue's first content.

    Raises:
        ValueError: a number is out of range.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image", "key")}
    student: ParametricNetwork

    def __init__(
        self,
        student: ParametricNetwork,
        counts: Sequence[int],
        options: GPaCoOptions,
        *,
        training: Training,
        seed: int = 0,
    ) -> None:
        super().__init__(student, training)
        device = next(student.parameters()).device
        self.options = options
        self.log_prior = log_prior(counts).to(device)
        generator = counted_generator(seed, "queue")
        self.queue = FeatureQueue(options.queue, options.width, generator=generator, device=device)
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _records(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        features: torch.Tensor,
        *,
        others: torch.Tensor,
        other_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        loss = parametric_contrastive_loss(
            logits,
            labels,
            features,
            torch.cat([others, self.queue.features]),
            torch.cat([other_labels, self.queue.labels]),
            self.log_prior,
            alpha=self.options.alpha,
            temperature=self.options.temperature,
        )
        return {"loss": loss, "train_accuracy": train_accuracy(logits, labels)}

    def after_step(self, t: int) -> None:
        """Write the step's features, of all micro-batches, into the queue."""
        super().after_step(t)
        gather = self.ranks.batch.gather_rows
        for features, labels in self._new:
            self.queue.write_(gather(features), gather(labels))
        self._new.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"queue": self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue.load_state_dict(state["queue"])
        self._new.clear()  # of a member that was dropped in its step


class PaCo(ParametricContrastive):
    """Anchors are one view's features; a slow network's features of the other fill the queue.

    A step reads the queue before its own keys are in it; the slow network moves after it.

    Args:
        student: the network, with the head "paco".
        counts: see `ParametricContrastive`, as are all that follow.
        options: with the momentum of the slow network, which is not that of the teacher.
        training: how long, and what is trained.
        seed: of the queue.

    Attributes:
        slow: what has the slow network, a copy of the student with all that it has. Its parameters
            follow the student's, the statistics of its batch norms are its own.
    """

    def __init__(
        self,
        student: ParametricNetwork,
        counts: Sequence[int],
        options: PaCoOptions,
        *,
        training: Training,
        seed: int = 0,
    ) -> None:
        super().__init__(student, counts, options, training=training, seed=seed)
        self.slow = Teacher(student, options.momentum, buffers="skip")
        self.slow.model.train()

    def models(self) -> dict[str, nn.Module]:
        return {**super().models(), "momentum": self.slow.model}

    def set_train_mode(self) -> None:
        super().set_train_mode()
        self.slow.model.train()
        set_train_mode(self.slow.model.deployed, self.part)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        views, labels = batch["labeled"].views, batch["labeled"].targets
        if len(labels) == 1:
            raise ConfigError(
                "SOLVER.IMS_PER_BATCH and ACCUMULATION_STEPS leave 1 image a pass of a process "
                "(must be at least 2: PaCo's projection has a batch norm)"
            )
        logits, queries = self.parallel_student(views["image"])
        with torch.no_grad():
            _, keys = self.slow.model(views["key"])
        self._new.append((keys, labels))
        return self._records(logits, labels, queries, others=keys, other_labels=labels)

    def after_step(self, t: int) -> None:
        super().after_step(t)
        self.slow.follow(t)


class GPaCo(ParametricContrastive):
    """PaCo without a slow network: both views are anchors, and classified.

    The second views' features fill the queue. The network has the head "gpaco". The optional label
    smoothing of the public code is left out.
    """

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        views, labels = batch["labeled"].views, batch["labeled"].targets
        logits, features = self.parallel_student(views["image"], views["key"])
        self._new.append((features[len(labels) :].detach(), labels))
        # No others but the queue.
        return self._records(
            logits, labels.repeat(2), features, others=features[:0], other_labels=labels[:0]
        )
