"""Parametric contrastive learning: PaCo (Cui et al., arXiv 2107.12028) and GPaCo (2209.12400)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.data.loader import ImageBatch
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.losses.contrastive import parametric_contrastive_loss
from ssod_imwa.classification.methods.base import ClassificationMethod, TrainingNetwork
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.freezing import Part, set_train_mode, train_only
from ssod_imwa.classification.models.heads import projection_head
from ssod_imwa.classification.models.momentum import FeatureQueue, MomentumEncoder
from ssod_imwa.engine.seeding import counted_generator


class ParametricNetwork(TrainingNetwork):
    """A classifier with a head that projects its features.

    Views given together go through the encoder together, so its batch norms see all of them.

    Args:
        deployed: the classifier.
        head: "paco" or "gpaco", see `projection_head`.
        hidden: width inside the head; None takes d, as the papers do.
        width: of the projections: 32 on CIFAR, 128 in large networks.

    Example:
        >>> from ssod_imwa.classification.models import CifarResNet
        >>> network = ParametricNetwork(CifarResNet(10, depth=8), head="paco")
        >>> logits, projections = network(torch.zeros(2, 3, 32, 32))
        >>> logits.shape, projections.shape
        (torch.Size([2, 10]), torch.Size([2, 32]))
    """

    deployed: ImageClassifier

    def __init__(
        self,
        deployed: ImageClassifier,
        *,
        head: Literal["paco", "gpaco"],
        hidden: int | None = None,
        width: int = 32,
    ) -> None:
        super().__init__(deployed)
        self.width = width
        d = deployed.num_features
        self.projection = projection_head(head, d, d if hidden is None else hidden, width)

    def outputs(self, *views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (nB, C) and projections (nB, width), rows of length 1, of n views in turn."""
        features = self.deployed.features(torch.cat(views))
        projections = F.normalize(widened(self.projection(features)), dim=1)
        return self.deployed.classifier(features), projections


class ParametricContrastive(ClassificationMethod):
    """What PaCo and GPaCo share: the loss, and the queue of earlier features with their labels.

    Args:
        student: the network.
        counts: training images of each class.
        iterations: T of a member.
        alpha: α, 0 or more, the weight of a sample beside the 1 of a class: 0.01 for PaCo on
            CIFAR, 0.02 to 0.05 on large sets.
        temperature: T of the samples, above 0: 0.05 for PaCo on CIFAR, 0.07 or 0.2 on large sets.
        queue: its rows, at least a batch: 1024 for PaCo on CIFAR, 8192 on large sets. It begins
            with random directions of no class.
        part: what of the classifier is trained, see `models.freezing`; the head always is.
        seed: of the queue's first content.
        ema_decay: of a teacher, see `ClassificationMethod`.

    Raises:
        ValueError: a number is out of range.
    """

    num_views = 2
    student: ParametricNetwork

    def __init__(
        self,
        student: ParametricNetwork,
        counts: Sequence[int],
        *,
        iterations: int,
        alpha: float = 0.01,
        temperature: float = 0.05,
        queue: int = 1024,
        part: Part = "all",
        seed: int = 0,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__(student, iterations=iterations, ema_decay=ema_decay)
        if not alpha >= 0:
            raise ValueError(f"alpha = {alpha} is not allowed (must be 0 or more)")
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature} is not allowed (must be above 0)")
        train_only(student.deployed, part)
        device = next(student.parameters()).device
        self.alpha = alpha
        self.temperature = temperature
        self.part = part
        self.log_prior = log_prior(counts).to(device)
        generator = counted_generator(seed, "queue")
        self.queue = FeatureQueue(queue, student.width, generator=generator, device=device)
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []

    def set_train_mode(self) -> None:
        self.student.train()
        set_train_mode(self.student.deployed, self.part)

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
            alpha=self.alpha,
            temperature=self.temperature,
        )
        with torch.no_grad():
            accuracy = 100 * (logits.argmax(1) == labels).float().mean()
        return {"loss": loss, "train_accuracy": accuracy}

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


class PaCo(ParametricContrastive):
    """Anchors are one view's features; a slow network's features of the other fill the queue.

    A step reads the queue before its own keys are in it; the slow network moves after it.

    Args:
        student: the network, with the head "paco".
        counts: see `ParametricContrastive`, as are all that follow but one.
        iterations: T of a member.
        alpha: α.
        temperature: T.
        queue: its rows.
        momentum: m of the slow network, see `MomentumEncoder`; not that of the teacher.
        part: what is trained.
        seed: of the queue.
        ema_decay: of a teacher.

    Attributes:
        encoder: the slow network, a copy of the student with all that it has.
    """

    def __init__(
        self,
        student: ParametricNetwork,
        counts: Sequence[int],
        *,
        iterations: int,
        alpha: float = 0.01,
        temperature: float = 0.05,
        queue: int = 1024,
        momentum: float = 0.999,
        part: Part = "all",
        seed: int = 0,
        ema_decay: float = 0.0,
    ) -> None:
        super().__init__(
            student,
            counts,
            iterations=iterations,
            alpha=alpha,
            temperature=temperature,
            queue=queue,
            part=part,
            seed=seed,
            ema_decay=ema_decay,
        )
        self.encoder = MomentumEncoder(student, momentum=momentum)

    def models(self) -> dict[str, nn.Module]:
        return {**super().models(), "momentum": self.encoder.key}

    def set_train_mode(self) -> None:
        super().set_train_mode()
        self.encoder.key.train()
        set_train_mode(self.encoder.key.deployed, self.part)

    def losses(self, batch: ImageBatch, t: int) -> dict[str, torch.Tensor]:
        labels = batch.labels
        logits, queries = self.parallel_student(batch.views[0])
        _, keys = self.encoder(batch.views[1])
        self._new.append((keys, labels))
        return self._records(logits, labels, queries, others=keys, other_labels=labels)

    def after_step(self, t: int) -> None:
        super().after_step(t)
        self.encoder.update_()


class GPaCo(ParametricContrastive):
    """PaCo without a slow network: both views are anchors, and classified.

    The second views' features fill the queue. The network has the head "gpaco". The optional label
    smoothing of the public code is left out.
    """

    def losses(self, batch: ImageBatch, t: int) -> dict[str, torch.Tensor]:
        labels = batch.labels
        logits, features = self.parallel_student(*batch.views)
        self._new.append((features[len(labels) :].detach(), labels))
        # No others but the queue.
        return self._records(
            logits, labels.repeat(2), features, others=features[:0], other_labels=labels[:0]
        )
