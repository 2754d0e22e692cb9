"""Soft Teacher for semi-supervised object detection (Xu et al., ICCV 2021, arXiv 2106.09018).

docs/soft_teacher.md lists the equations and where this implementation differs from the public one
and from mmdetection's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ssod_imwa.averaging.ema import Decay, constant_decay, warmup_decay
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.box_jitter import box_deviation, jitter_boxes
from ssod_imwa.detection.data.geometry import between, map_boxes
from ssod_imwa.detection.data.records import Detections, Targets, View
from ssod_imwa.detection.detectors.base import Detector, Inference
from ssod_imwa.detection.detectors.parts import Parts, SampledBoxes
from ssod_imwa.detection.losses import weighted_cross_entropy
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.methods.supervised import images_and_targets
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.pseudo_labels import (
    as_targets,
    filter_detections,
    larger_than,
    move_detections,
    select_detections,
    summarize,
)
from ssod_imwa.engine.teacher import Teacher
from ssod_imwa.errors import ConfigError


@dataclass(frozen=True)
class SoftTeacherOptions(Options):
    """Filters, weights and teacher of Soft Teacher."""

    burn_in_iters: int = option(
        0,
        "B, iterations on labeled images alone, while the teacher follows; 0 is the method's",
        low=0,
        iterations=True,
    )
    ema_decay: float = option(0.999, "a, decay of the teacher", low=0, high=1, decay=True)
    ema_warmup: bool = option(
        True,
        "begin with the mean of all students so far: the decay is min(a, 1 - 1 / (t + 2)) after "
        "iteration t; mmdetection's is constant",
    )
    ema_buffers: Literal["skip", "ema", "copy"] = option(
        "skip",
        'the teacher\'s buffers: "skip" averages parameters alone, as published, for frozen batch '
        'norms; trained ones need "ema" or "copy"',
    )
    teacher_proposals: Literal["train", "test"] = option(
        "train",
        "number of proposals among which the teacher finds boxes: that of training, or that of "
        "evaluation, as mmdetection's",
    )
    initial_threshold: float = option(
        0.5, "the teacher's boxes above this score are looked at", low=0, high=1, per_member=True
    )
    rpn_threshold: float = option(
        0.9,
        "a box becomes a label of the proposals above this score",
        low=0,
        high=1,
        per_member=True,
    )
    bbox_threshold: float = option(
        0.9,
        "a box becomes a label of the classification above this score",
        low=0,
        high=1,
        per_member=True,
    )
    box_deviation: float = option(
        0.02,
        "a box becomes a label of the box regression below this deviation",
        low=0,
        per_member=True,
    )
    jitters: int = option(10, "copies of a box by which its deviation is measured", low=2)
    jitter_scale: float = option(
        0.06, "standard deviation of their noise, as a share of the box's width or height", low=0
    )
    min_box_size: float = option(
        0.0,
        "labels are wider and higher than so many pixels; mmdetection's is 0.01",
        low=0,
        per_member=True,
    )
    soft_background: bool = option(
        True, "weigh background by the teacher's probability of it; False weighs all alike"
    )
    empty_batches: Literal["learn", "skip"] = option(
        "learn",
        'without any box above INITIAL_THRESHOLD a batch teaches background ("learn") or nothing '
        '("skip", mmdetection\'s semi-supervised base class)',
    )
    unsup_loss_weight: float = option(
        4.0, "w_u, weight of all four losses on pseudo-labels", low=0, per_member=True
    )


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's boxes as labels of the strong views.

    Attributes:
        proposed: those of the proposals, for each image.
        classified: those of the classification.
        refined: those of the box regression.
        deviations: (n,), of all boxes that the initial filter left.
    """

    proposed: list[Detections]
    classified: list[Detections]
    refined: list[Detections]
    deviations: torch.Tensor

    @property
    def is_empty(self) -> bool:
        """Whether no box passed the initial filter."""
        return not len(self.deviations)

    def summary(self) -> dict[str, torch.Tensor]:
        """What to watch: as `summarize`, of the classification, and of the box regression."""
        count, refined = len(self.deviations), sum(len(item) for item in self.refined)
        return {
            **summarize(self.classified),
            "pseudo_boxes_refined": self.deviations.new_tensor(refined / len(self.refined)),
            "pseudo_deviation": self.deviations.sum() / max(count, 1),
        }


class SoftTeacherLoss:
    """What a student learns of the strong views, each of its losses from labels of its own.

    Args:
        proposed: labels of the proposals of each image.
        classified: labels of the classification of sampled regions.
        refined: labels of the box regression, for which regions are sampled a second time.
        reliability: from background boxes of each image, (n, 4) in pixels of the strong view, to
            their weights, (R,) for all images.

    Attributes:
        background_weight: mean weight of the background boxes once the losses are computed.
    """

    def __init__(
        self,
        proposed: Sequence[Targets],
        classified: Sequence[Targets],
        refined: Sequence[Targets],
        reliability: Callable[[list[torch.Tensor]], torch.Tensor],
    ) -> None:
        self.proposed, self.classified, self.refined = proposed, classified, refined
        self._reliability = reliability
        self.background_weight: torch.Tensor | None = None

    def __call__(self, parts: Parts) -> dict[str, torch.Tensor]:
        regions = parts.regions
        proposals, losses = regions.propose(self.proposed)
        sampled = regions.sample(proposals, self.classified)
        logits = regions.predict([item.boxes for item in sampled]).logits
        labels = torch.cat([item.labels for item in sampled])
        weights = self._weights(sampled, background=logits.shape[1] - 1)
        losses["loss_cls"] = weighted_cross_entropy(logits, labels, weights)
        sampled = regions.sample(proposals, self.refined)
        outputs = regions.predict([item.boxes for item in sampled])
        losses["loss_box_reg"] = regions.box_loss(outputs, sampled)
        return losses

    def _weights(self, sampled: Sequence[SampledBoxes], *, background: int) -> torch.Tensor:
        """1 for objects, the reliability for background, (R,) for all images."""
        labels = torch.cat([item.labels for item in sampled])
        reliability = self._reliability([x.boxes[x.labels == background] for x in sampled])
        self.background_weight = reliability.sum() / max(len(reliability), 1)
        weights = reliability.new_ones(len(labels))
        weights[labels == background] = reliability
        return weights


class SoftTeacher(DetectionMethod):
    """A teacher labels weak views; the student learns on strong views as far as it is reliable.

    With the teacher's boxes b of score s and deviation u on the weak views::

        L = L_sup + w_u (L_rpn_cls + L_rpn_loc + L_cls + L_box_reg)

        L_rpn_cls, L_rpn_loc   from the boxes with s > 0.9
        L_cls                  from those with s > 0.9; a background region j counts as much as the
                               teacher thinks it background: sum_i w_i CE_i / max(sum_i w_i, 1),
                               w_i = 1 for objects, w_j = p_teacher(background | j)
        L_box_reg              from those with s > 0.5 and u < 0.02, by a sampling of its own

    The teacher starts as a copy and follows after every step, in iteration t with the decay
    min(a, 1 - 1 / (t + 2)): what the public code does at the start of iteration t + 1.

    Args:
        student: a detector with the ability "regions"; the teacher is made as a copy of it.
        options: filters and weights.

    Raises:
        ConfigError: the detector has no regions, or batch norms that train and a teacher whose
            buffers would stay those of the initial weights.
    """

    needs = frozenset({"regions"})
    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("colored",),
        "unlabeled": ("weak", "strong"),
    }
    cross_teaches = ("other", "agree")
    teacher: Teacher[Detector]

    def __init__(self, student: Detector, options: SoftTeacherOptions) -> None:
        if options.ema_buffers == "skip":
            _refuse_trained_norms(student)
        decay = _decay(options.ema_decay, warmup=options.ema_warmup)
        super().__init__(student, Teacher(student, decay, buffers=options.ema_buffers))
        self.options = options

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, targets = images_and_targets(batch["labeled"].views["colored"])
        supervised = self.parallel_student(images, SupervisedLoss(targets))
        if t < self.options.burn_in_iters:
            return supervised
        return {**supervised, **self._unlabeled_losses(batch["unlabeled"])}

    def _unlabeled_losses(self, part: Part) -> dict[str, torch.Tensor]:
        weak, strong = part.views["weak"], part.views["strong"]
        # Kept until the losses are computed: it scores the student's regions by the same features.
        images = [view.image for view in weak]
        all_proposals = self.options.teacher_proposals == "train"
        teacher = self.labeling_detector.inference(images, training_proposals=all_proposals)
        detections = self.agreed_with_other(
            teacher.detections(),
            lambda x: x.inference(images, training_proposals=all_proposals).detections(),
            self.options.initial_threshold,
        )
        self.record_labels(part, weak, detections, self.options.bbox_threshold)
        labels = self._labels(teacher, detections, weak, strong)
        learned = SoftTeacherLoss(
            [as_targets(item) for item in labels.proposed],
            [as_targets(item) for item in labels.classified],
            [as_targets(item) for item in labels.refined],
            self._reliability(teacher, weak, strong),
        )
        losses = self.parallel_student([view.image for view in strong], learned)
        weight = self.options.unsup_loss_weight
        if labels.is_empty and self.options.empty_batches == "skip":
            weight = 0.0  # times the losses: every parameter still gets a gradient
        weighted = {f"{name}_pseudo": weight * value for name, value in losses.items()}
        assert learned.background_weight is not None, "losses were computed"
        return {**weighted, **labels.summary(), "background_weight": learned.background_weight}

    def _labels(
        self,
        teacher: Inference,
        detections: Sequence[Detections],
        weak: Sequence[View],
        strong: Sequence[View],
    ) -> SoftLabels:
        options = self.options
        detections = [
            larger_than(filter_detections(item, options.initial_threshold), options.min_box_size)
            for item in detections
        ]
        deviations = self._deviations(teacher, detections)

        def moved(chosen: Sequence[torch.Tensor]) -> list[Detections]:
            """The chosen boxes of each image on its strong view."""
            labels = (
                move_detections(select_detections(item, mask), *views)
                for item, mask, *views in zip(detections, chosen, weak, strong, strict=True)
            )
            return [larger_than(item, options.min_box_size) for item in labels]

        return SoftLabels(
            proposed=moved([item.scores > options.rpn_threshold for item in detections]),
            classified=moved([item.scores > options.bbox_threshold for item in detections]),
            refined=moved([deviation < options.box_deviation for deviation in deviations]),
            deviations=torch.cat(deviations),
        )

    def _deviations(
        self, teacher: Inference, detections: Sequence[Detections]
    ) -> list[torch.Tensor]:
        """How far each box moves when its proposal is jittered, (n,) for each image."""
        copies, scale = self.options.jitters, self.options.jitter_scale
        jittered = [
            jitter_boxes(item.boxes, copies=copies, scale=scale).flatten(0, 1)
            for item in detections
        ]
        deviations = []
        for item, scored in zip(detections, teacher.score_regions(jittered), strict=True):
            rows = torch.arange(len(scored.boxes), device=scored.boxes.device)
            of_class = scored.boxes[rows, item.labels.repeat(copies)]
            deviations.append(box_deviation(of_class.view(copies, len(item), 4)))
        return deviations

    def _reliability(
        self, teacher: Inference, weak: Sequence[View], strong: Sequence[View]
    ) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        """From boxes of the strong views to the teacher's probability that they are background."""

        def reliability(boxes: list[torch.Tensor]) -> torch.Tensor:
            moved = [
                map_boxes(
                    item,
                    between(source, target),
                    height=target.image.shape[-2],
                    width=target.image.shape[-1],
                )
                for item, source, target in zip(boxes, strong, weak, strict=True)
            ]
            return torch.cat([x.probabilities[:, -1] for x in teacher.score_regions(moved)])

        if self.options.soft_background:
            return reliability
        return lambda boxes: torch.cat([item.new_ones(len(item)) for item in boxes])


def _decay(decay: float, *, warmup: bool) -> Decay:
    """As a function of the iteration after which the teacher follows."""
    if not warmup:
        return constant_decay(decay)
    rising = warmup_decay(decay)
    return lambda t: rising(t + 1)


def _refuse_trained_norms(student: nn.Module) -> None:
    """Raise ConfigError if there are running statistics, which a teacher has to follow."""
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ConfigError(
                f"SSOD.EMA_BUFFERS = 'skip' is not allowed with batch norms that train, such as "
                f"{name} (must be 'ema' or 'copy', or MODEL.RESNETS.NORM FrozenBN)"
            )
