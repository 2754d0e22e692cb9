"""Unbiased Teacher for semi-supervised object detection (Liu et al., ICLR 2021, arXiv 2102.09480).

docs/unbiased_teacher.md lists the equations and where this implementation differs from the public
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ssod_imwa.config.options import option
from ssod_imwa.data.batches import Batch, Part
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

# Weighted by `unsup_box_loss_weight`: the score of a pseudo-label says how sure its class is, not
# how well its box fits.
BOX_LOSSES = ("loss_rpn_loc", "loss_box_reg", "loss_centerness", "loss_quality")


@dataclass(frozen=True)
class UnbiasedTeacherOptions(SupervisedOptions):
    """What Unbiased Teacher adds to training on labeled images."""

    burn_in_iters: int = option(
        2000,
        "B, iterations on labeled images alone before the teacher starts; 0 starts it from the "
        "initial weights",
        low=0,
        iterations=True,
    )
    ema_decay: float = option(
        0.9996,
        "a, decay of the teacher; 0.9996 averages the last 2500 iterations or so",
        low=0,
        high=1,
        decay=True,
    )
    bbox_threshold: float = option(
        0.7, "a teacher's box becomes a label above this score", low=0, high=1, per_member=True
    )
    unsup_loss_weight: float = option(
        4.0, "w_u, weight of the classification losses on pseudo-labels", low=0, per_member=True
    )
    unsup_box_loss_weight: float = option(
        0.0,
        "w_box, weight of the box losses on pseudo-labels; 0 (the method's) only reports them",
        low=0,
        per_member=True,
    )


class UnbiasedTeacher(DetectionMethod):
    """A teacher, the student's EMA, labels weak views from which the student learns strong ones.

    With the member's own iteration t and burn-in length B::

        t < B    L = L_sup
        t = B-1  teacher := student, after the step
        t >= B   L = L_sup + w_u (L_rpn_cls + L_cls) + w_box (L_rpn_loc + L_box_reg)
                 teacher := a teacher + (1 - a) student, after the step

    The last four losses are those of the unlabeled images' strong views with the teacher's boxes.

    Args:
        student: the detector; the teacher is made as a copy of it.
        options: B, a, w_u, w_box and the rest.
    """

    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak", "strong"),
        "unlabeled": ("weak", "strong"),
    }
    cross_teaches = ("other", "agree")
    teacher: Teacher[Detector]

    def __init__(self, student: Detector, options: UnbiasedTeacherOptions) -> None:
        start = options.burn_in_iters
        super().__init__(student, Teacher(student, options.ema_decay, start=start))
        self.options = options
        if not options.strong_labeled:
            self.reads = {**self.reads, "labeled": ("weak",)}

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, targets = labeled_views(batch["labeled"], strong=self.options.strong_labeled)
        supervised = self.parallel_student(images, SupervisedLoss(targets))
        if t < self.options.burn_in_iters:
            return supervised
        # Two forward passes before one backward: batch norms see labeled and unlabeled images
        # apart, and DistributedDataParallel allows it as long as it does not broadcast buffers.
        return {**supervised, **self._unlabeled_losses(batch["unlabeled"])}

    def _unlabeled_losses(self, part: Part) -> dict[str, torch.Tensor]:
        weak, strong = part.views["weak"], part.views["strong"]
        threshold = self.options.bbox_threshold
        detections = self.teach([view.image for view in weak], threshold)
        self.record_labels(part, weak, detections, threshold)
        pseudo_labels = [
            move_detections(filter_detections(item, threshold), *views)
            for item, *views in zip(detections, weak, strong, strict=True)
        ]
        losses = self.pseudo_losses(
            [view.image for view in strong],
            SupervisedLoss([as_targets(labels) for labels in pseudo_labels]),
        )
        # A weight of 0 keeps its loss in the graph: every parameter gets a gradient on every rank.
        boxes, classes = self.options.unsup_box_loss_weight, self.options.unsup_loss_weight
        weighted = {
            f"{name}_pseudo": value * (boxes if _is_box_loss(name) else classes)
            for name, value in losses.items()
        }
        return {**weighted, **summarize(pseudo_labels)}


def _is_box_loss(name: str) -> bool:
    # Cascade R-CNN's heads have a loss each: loss_box_reg_stage0, _stage1, ...
    return name.partition("_stage")[0] in BOX_LOSSES
