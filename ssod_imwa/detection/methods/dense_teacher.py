"""Dense Teacher for semi-supervised object detection (Zhou et al., ECCV 2022, arXiv 2207.02541).

docs/dense_teacher.md lists the equations and where this implementation differs from the public one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, generalized_box_iou_loss

from ssod_imwa.config.options import option
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Detections, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.parts import DenseMaps, Parts
from ssod_imwa.detection.losses import quality_focal_loss
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.methods.supervised import SupervisedOptions, labeled_views
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.engine.teacher import Teacher
from ssod_imwa.errors import ConfigError

# For those who watch: a location of the learning region counts as a label above this probability.
LIKELY = 0.5
SAME_OBJECT = 0.5  # IoU above which two locations speak of one object


@dataclass(frozen=True)
class DenseTeacherOptions(SupervisedOptions):
    """What Dense Teacher adds to training on labeled images.

    Raises:
        ValueError: the teacher starts after it is first asked.
    """

    burn_in_iters: int = option(
        5000,
        "B, iterations on labeled images alone; the losses on dense labels then rise for as many",
        low=0,
        iterations=True,
    )
    ema_start_iters: int = option(
        3000,
        "E0, iterations before the teacher starts as a copy of the student; at most BURN_IN_ITERS",
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
    region_ratio: float = option(
        0.01,
        "share of the locations, the teacher's surest, that are learned",
        above=0,
        high=1,
        per_member=True,
    )
    unsup_loss_weight: float = option(
        4.0, "w_c, weight of the classification loss on dense labels", low=0, per_member=True
    )
    unsup_box_loss_weight: float = option(
        1.0, "weight of the box loss on dense labels", low=0, per_member=True
    )
    unsup_quality_loss_weight: float = option(
        1.0,
        "weight of the quality loss on dense labels; RetinaNet has none",
        low=0,
        per_member=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_start_iters > self.burn_in_iters:
            raise ValueError(
                f"ema_start_iters = {self.ema_start_iters} is not allowed (must be at most "
                f"burn_in_iters = {self.burn_in_iters}, when the teacher is first asked)"
            )


class DenseTeacher(DetectionMethod):
    """A teacher's maps of weak views are the labels of the student's maps of strong views.

    With the member's own iteration t, burn-in length B, EMA start E0::

        t = E0 - 1  teacher := student, after the step
        t >= E0     teacher := a teacher + (1 - a) student, after the step
        t <= B      L = L_sup
        t > B       L = L_sup + r(t) (w_c L_cls + w_box L_box + w_q L_q)
        r(t) = min(1, (t - B) / B)

    Args:
        student: the detector; the teacher is made as a copy of it.
        options: B, E0, a, the weights and the rest.
    """

    needs = frozenset({"dense"})
    same_geometry = True
    reads: Mapping[str, tuple[str, ...]] = {
        "labeled": ("weak", "strong"),
        "unlabeled": ("weak", "strong"),
    }
    cross_teaches = ("other",)  # a map has no boxes that could agree
    teacher: Teacher[Detector]

    def __init__(self, student: Detector, options: DenseTeacherOptions) -> None:
        start = options.ema_start_iters
        super().__init__(student, Teacher(student, options.ema_decay, start=start))
        self.options = options
        if not options.strong_labeled:
            self.reads = {**self.reads, "labeled": ("weak",)}

    @property
    def burn_in(self) -> int:
        return self.options.burn_in_iters

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        weak, strong = (batch["unlabeled"].views[name] for name in ("weak", "strong"))
        # In burn-in, too: what cannot be trained should not train for hours first.
        check_same_geometry(weak, strong)
        images, targets = labeled_views(batch["labeled"], strong=self.options.strong_labeled)
        supervised = self.parallel_student(images, SupervisedLoss(targets))
        share = ramp(t, self.options.burn_in_iters)
        if share == 0:
            return supervised
        return {**supervised, **self._dense_losses(batch["unlabeled"], share)}

    def _dense_losses(self, part: Part, share: float) -> dict[str, torch.Tensor]:
        weak, strong = part.views["weak"], part.views["strong"]
        labels = label_densely(
            self.labeling_detector.dense_maps([view.image for view in weak]),
            self.options.region_ratio,
        )
        if self.label_statistics is not None:
            self.record_labels(part, weak, region_detections(labels), LIKELY)
        losses = self.parallel_student([view.image for view in strong], DenseLoss(labels))
        weights = {
            "loss_cls": self.options.unsup_loss_weight,
            "loss_box_reg": self.options.unsup_box_loss_weight,
            "loss_quality": self.options.unsup_quality_loss_weight,
        }
        weighted = {f"{name}_pseudo": share * weights[name] * x for name, x in losses.items()}
        return {**weighted, "pseudo_score": labels.total / len(labels.region)}


@dataclass(frozen=True)
class DenseLabels:
    """A teacher's maps as labels.

    Attributes:
        maps: of B images with N locations each, without gradient.
        region: int64 (k,), the learning region: numbers among the B * N locations.
        total: F, the sum of the region's scores, a scalar.
    """

    maps: DenseMaps
    region: torch.Tensor
    total: torch.Tensor


def label_densely(maps: DenseMaps, ratio: float) -> DenseLabels:
    """The teacher's maps with the locations that are learned, the surest of the whole batch.

    The score of a location is its largest class probability. Padded locations count.

    Args:
        maps: of the teacher.
        ratio: k over the number of locations; at least one location is learned.

    Source: Dense Teacher, section 3.3; k = floor(ratio * B * N) over images and levels together, as
    in its public code.
    """
    scores = maps.logits.amax(2).flatten()
    # By logits: probabilities near 1 round to ties.
    region = scores.topk(max(1, int(ratio * len(scores)))).indices
    return DenseLabels(maps, region, scores[region].sigmoid().sum())


@torch.no_grad()
def region_detections(labels: DenseLabels) -> list[Detections]:
    """What the learning region says of each image, one box for each object, by falling score.

    Nothing is learned from it: it is for counting, judging and drawing what is taught.
    """
    maps, places = labels.maps, labels.maps.logits.shape[1]
    scores, classes = maps.logits.flatten(0, 1)[labels.region].sigmoid().max(1)
    boxes = maps.boxes.flatten(0, 1)[labels.region]
    image = labels.region // places
    found = []
    for number in range(len(maps.logits)):
        chosen = torch.where(image == number)[0]
        item = Detections(boxes[chosen], classes[chosen], scores[chosen])
        keep = batched_nms(item.boxes, item.scores, item.labels, SAME_OBJECT)
        found.append(Detections(item.boxes[keep], item.labels[keep], item.scores[keep]))
    return found


class DenseLoss:
    """Losses of a student's maps with respect to dense labels.

    With teacher's and student's class probabilities p^T and p^S, the learning region S of k
    locations, boxes d, quality logits q::

        F = sum_{i in S} max_c p^T_ic
        loss_cls = 1/F (sum_{i in S, c} QFL(p^S_ic, p^T_ic) + sum_{i not in S, c} QFL(p^S_ic, 0))
        loss_box_reg = 1/k sum_{i in S} (1 - GIoU(d^S_i, d^T_i))
        loss_quality = 1/k sum_{i in S} BCE(sigmoid(q^S_i), sigmoid(q^T_i))

    The last one is left out where the detector has no quality.

    Source: Dense Teacher, equations 2 to 5, with the normalizers of its public code.
    """

    def __init__(self, labels: DenseLabels) -> None:
        self.labels = labels

    def __call__(self, parts: Parts) -> dict[str, torch.Tensor]:
        student, teacher, region = parts.dense_maps(), self.labels.maps, self.labels.region
        logits, sure = student.logits.flatten(0, 1), teacher.logits.flatten(0, 1)[region]
        targets = torch.zeros_like(logits)
        targets[region] = sure.sigmoid()
        boxes = student.boxes.flatten(0, 1)[region]
        losses = {
            # F is positive but in float32 may be 0.
            "loss_cls": quality_focal_loss(logits, targets).sum()
            / self.labels.total.clamp(min=torch.finfo(torch.float32).eps),
            "loss_box_reg": generalized_box_iou_loss(
                boxes, teacher.boxes.flatten(0, 1)[region], reduction="mean"
            ),
        }
        if student.quality is not None and teacher.quality is not None:
            losses["loss_quality"] = F.binary_cross_entropy_with_logits(
                student.quality.flatten()[region], teacher.quality.flatten()[region].sigmoid()
            )
        return losses


def ramp(t: int, burn_in: int) -> float:
    """The share of the losses on dense labels at own iteration t: 0 up to B, 1 from 2 B on.

    Example:
        >>> [ramp(t, 10) for t in (10, 15, 20, 30)]
        [0.0, 0.5, 1.0, 1.0]
    """
    return min(1.0, max(0, t - burn_in) / max(burn_in, 1))


def check_same_geometry(weak: Sequence[View], strong: Sequence[View]) -> None:
    """Refuse strong views whose pixels are not where those of their weak views are.

    Maps are compared location by location: a turned map would teach wrong boxes.

    Raises:
        ConfigError: a pair of views differs.
    """
    for one, other in zip(weak, strong, strict=True):
        if one.image.shape != other.image.shape or not torch.equal(one.matrix, other.matrix):
            raise ConfigError(
                "SSOD.ALGORITHM = 'dense_teacher' needs strong views with the geometry of their "
                "weak views: maps are learned location by location (use strong views that change "
                "colors alone)"
            )
