"""Mean teacher (Tarvainen and Valpola, arXiv 1703.01780): the plainest use of an EMA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ssod_imwa.classification.labelers.base import PseudoLabels
from ssod_imwa.classification.labelers.records import count_labels
from ssod_imwa.classification.losses.base import Criterion, widened
from ssod_imwa.classification.methods.base import ClassificationMethod, Training, train_accuracy
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch
from ssod_imwa.engine.teacher import Teacher


@dataclass(frozen=True)
class MeanTeacherOptions(Options):
    """The consistency loss."""

    unsup_loss_weight: float = option(
        50.0, "w, weight of the consistency loss at last", low=0, per_member=True
    )
    rampup_part: float = option(
        0.4, "part of the training in which the weight rises to it", low=0, high=1, per_member=True
    )


class MeanTeacher(ClassificationMethod):
    """The student is to predict of one view what its average predicts of another.

    With predictions p of the student and p̄ of the teacher, in eval mode, and x = t / (part T)::

        L = L_s(z(x), y) + w(t) mean (p(strong) − p̄(weak))²      mean over images and classes
        w(t) = w exp(−5 (1 − min(1, x))²)

    With IMWA.CROSS_TEACH another member's teacher gives p̄ ("other"), or images on which it predicts
    another class count 0 in the mean ("agree").

    Args:
        student: the network.
        criterion: L_s; balanced softmax is "+ LA".
        options: see there.
        training: see `ClassificationMethod`; with a teacher.
        knows_truth: as FixMatch's; what the teacher predicts is counted as labels, all learned.

    Raises:
        ValueError: a number is out of range, or there is no teacher.
    """

    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak",),
        "unlabeled": ("weak", "strong"),
    }
    cross_teaches = ("other", "agree")
    student: ImageClassifier
    teacher: Teacher[ImageClassifier]

    def __init__(
        self,
        student: ImageClassifier,
        criterion: Criterion,
        options: MeanTeacherOptions,
        *,
        training: Training,
        knows_truth: bool = False,
    ) -> None:
        if training.ema_decay == 0:
            raise ValueError("ema_decay = 0 is not allowed (must be above 0: it is the teacher's)")
        super().__init__(student, training)
        self.knows_truth = knows_truth
        self.options = options
        self.criterion = criterion.to(next(student.parameters()).device)

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, labels = batch["labeled"].views["weak"], batch["labeled"].targets
        views = batch["unlabeled"].views
        logits = self.parallel_student(torch.cat([images, views["strong"]]))
        labeled, strong = logits[: len(images)], logits[len(images) :]
        targets, learned = self._targets(views["weak"])
        if self.label_statistics is not None:
            taught = PseudoLabels(targets.argmax(1), learned, targets, {})
            truth = batch["unlabeled"].targets if self.knows_truth else None
            count_labels(self.label_statistics, taught, truth)
        apart = (widened(strong).softmax(1) - targets).square()
        if self.cross_teach == "agree":
            apart = apart * learned[:, None]
        return {
            "loss_labeled": self.criterion(labeled, labels, progress=self.progress(t)),
            "loss_unlabeled": self.weight(t) * apart.mean(),
            "train_accuracy": train_accuracy(labeled, labels),
        }

    @torch.no_grad()
    def _targets(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions (n, C) to be made of other views, and which of them (n,) are learned."""
        own, other = self.teacher.model, self.other_teacher
        model = other if other is not None and self.cross_teach == "other" else own
        targets = widened(model(images)).softmax(1)
        learned = torch.ones_like(targets[:, 0], dtype=torch.bool)
        if other is not None and self.cross_teach == "agree":
            learned = targets.argmax(1) == other(images).argmax(1)
        return targets, learned

    def weight(self, t: int) -> float:
        """w(t) of the consistency loss."""
        length = self.options.rampup_part * self.iterations
        rise = min(1.0, t / length) if length > 0 else 1.0
        return self.options.unsup_loss_weight * math.exp(-5 * (1 - rise) ** 2)
