"""Unbiased Teacher for semi-supervised object detection (Liu et al., ICLR 2021, arXiv 2102.09480).

docs/unbiased_teacher.md lists the equations and where this implementation differs from the public
one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.detection.data.records import DetectionBatch, Sample
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.methods.supervised import labeled_views
from ssod_imwa.detection.pseudo_labels import as_targets, filter_detections, summarize

# Weighted by `unsup_box_loss_weight`: the score of a pseudo-label says how sure its class is, not
# how well its box fits.
BOX_LOSSES = ("loss_rpn_loc", "loss_box_reg", "loss_centerness")


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
        burn_in: B, iterations on labeled images alone; 0 starts the teacher from the initial
            weights.
        ema_decay: a, in [0, 1]; the method's 0.9996 averages the last 2500 iterations or so.
        threshold: a box becomes a label above this score.
        unsup_loss_weight: w_u.
        unsup_box_loss_weight: w_box; at the method's 0 the losses are still computed and reported.
        strong_labeled: train on labeled images' strong views beside the weak ones.

    Raises:
        ValueError: an argument is out of range.
    """

    teacher: Detector

    def __init__(
        self,
        student: Detector,
        *,
        burn_in: int = 2000,
        ema_decay: float = 0.9996,
        threshold: float = 0.7,
        unsup_loss_weight: float = 4.0,
        unsup_box_loss_weight: float = 0.0,
        strong_labeled: bool = True,
    ) -> None:
        if burn_in < 0:
            raise ValueError(f"burn_in = {burn_in} is not allowed (must be at least 0)")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold = {threshold} is not allowed (must be in [0, 1])")
        if min(unsup_loss_weight, unsup_box_loss_weight) < 0:
            raise ValueError(
                f"loss weights {unsup_loss_weight} and {unsup_box_loss_weight} are not allowed "
                "(must be at least 0)"
            )
        super().__init__(student, copy.deepcopy(student))
        self.burn_in = burn_in
        self.threshold = threshold
        self.unsup_loss_weight = unsup_loss_weight
        self.unsup_box_loss_weight = unsup_box_loss_weight
        self.strong_labeled = strong_labeled
        self._ema = ModelEMA(self.teacher, student, ema_decay)

    def losses(self, batch: DetectionBatch, t: int) -> dict[str, torch.Tensor]:
        supervised = self.parallel_student(
            *labeled_views(batch.labeled, strong=self.strong_labeled)
        )
        if t < self.burn_in:
            return supervised
        # Two forward passes before one backward: batch norms see labeled and unlabeled images
        # apart, and DistributedDataParallel allows it as long as it does not broadcast buffers.
        return {**supervised, **self._unlabeled_losses(batch.unlabeled)}

    def _unlabeled_losses(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        if not samples:
            raise ValueError("a batch without unlabeled images is not allowed after burn-in")
        detections = self.teacher.detect([sample.weak.image for sample in samples])
        kept = [filter_detections(found, self.threshold) for found in detections]
        # Weak and strong views share their geometry, so boxes carry over as they are.
        losses = self.parallel_student(
            [sample.strong.image for sample in samples], [as_targets(found) for found in kept]
        )
        # A weight of 0 keeps its loss in the graph: every parameter gets a gradient on every rank.
        weighted = {
            f"{name}_pseudo": value
            * (self.unsup_box_loss_weight if name in BOX_LOSSES else self.unsup_loss_weight)
            for name, value in losses.items()
        }
        return {**weighted, **summarize(kept)}

    def after_step(self, t: int) -> None:
        if t == self.burn_in - 1:
            self._ema.copy()
        elif t >= self.burn_in:
            self._ema.update(t)

    def teacher_ready(self, t: int) -> bool:
        return t + 1 >= self.burn_in
