"""Mean teacher: the simplest semi-supervised baseline (Tarvainen and Valpola, arXiv 1703.01780)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ssod_imwa.averaging.ema import warmup_decay
from ssod_imwa.config.options import option
from ssod_imwa.data.batches import Batch
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.methods.supervised import SupervisedOptions, labeled_views
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.pseudo_labels import (
    as_targets,
    filter_detections,
    move_detections,
    summarize,
)
from ssod_imwa.engine.teacher import Teacher


@dataclass(frozen=True)
class MeanTeacherOptions(SupervisedOptions):
    """What a mean teacher adds to training on labeled images."""

    ema_decay: float = option(
        0.999,
        "a, decay of the teacher, after as many iterations as it averages",
        low=0,
        high=1,
        decay=True,
    )
    bbox_threshold: float = option(
        0.7, "a teacher's box becomes a label above this score", low=0, high=1, per_member=True
    )
    unsup_loss_weight: float = option(
        1.0, "w, weight of all losses on pseudo-labels, once it has risen", low=0, per_member=True
    )
    rampup_iters: int = option(
        1000,
        "iterations in which that weight rises from w / 150 to w",
        low=1,
        iterations=True,
        per_member=True,
    )


class MeanTeacher(DetectionMethod):
    """L = L_sup + w exp(-5 (1 - t / ramp)^2) L_unsup, with an EMA from the first step on.

    L_sup are the detector's own losses of labeled images, L_unsup the same losses of unlabeled
    images' strong views with the boxes that the teacher is sure of on their weak views.

    Args:
        student: any detector; the teacher is made as a copy of it.
        options: a, w, the ramp and the threshold.
    """

    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak", "strong"),
        "unlabeled": ("weak", "strong"),
    }
    cross_teaches = ("other", "agree")
    teacher: Teacher[Detector]

    def __init__(self, student: Detector, options: MeanTeacherOptions) -> None:
        super().__init__(student, Teacher(student, warmup_decay(options.ema_decay)))
        self.options = options
        if not options.strong_labeled:
            self.reads = {**self.reads, "labeled": ("weak",)}

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, targets = labeled_views(batch["labeled"], strong=self.options.strong_labeled)
        supervised = self.parallel_student(images, SupervisedLoss(targets))
        weak, strong = batch["unlabeled"].views["weak"], batch["unlabeled"].views["strong"]
        detections = self.teach([view.image for view in weak], self.options.bbox_threshold)
        self.record_labels(batch["unlabeled"], weak, detections, self.options.bbox_threshold)
        labels = [  # boxes travel by the views' matrices, whatever each view did
            move_detections(filter_detections(item, self.options.bbox_threshold), *views)
            for item, *views in zip(detections, weak, strong, strict=True)
        ]
        learned = SupervisedLoss([as_targets(boxes) for boxes in labels])
        unsupervised = self.pseudo_losses([view.image for view in strong], learned)
        ramp = math.exp(-5 * (1 - min(1, t / self.options.rampup_iters)) ** 2)
        weight = self.options.unsup_loss_weight * ramp
        weighted = {f"{name}_pseudo": weight * value for name, value in unsupervised.items()}
        return {**supervised, **weighted, **summarize(labels)}
