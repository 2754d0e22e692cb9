"""What the methods of detection have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.data.batches import Part
from ssod_imwa.detection.data.geometry import map_boxes
from ssod_imwa.detection.data.records import Annotations, Detections, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.parts import missing_ability
from ssod_imwa.detection.label_truth import judge_labels
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.detection.pseudo_labels import agreeing, filter_detections
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.teacher import Teacher


class DetectionMethod(Method):
    """A method around a detector; its state is what the detector keeps outside its state dict.

    Attributes:
        needs: abilities that its detector has to have.
        same_geometry: whether strong views have to show the pixels of their weak views in place.
        hidden_truth: annotations of the unlabeled images by their positions, None where there are
            none; to judge a teacher's labels by, never to learn from.
        last_labels: weak views of the last unlabeled batch and the teacher's labels on them.

    Raises:
        ConfigError: the detector lacks one.
    """

    needs: frozenset[str] = frozenset()
    same_geometry: bool = False
    student: Detector

    def __init__(self, student: Detector, teacher: Teacher | None = None) -> None:
        for ability in sorted(self.needs - student.abilities):
            raise missing_ability(type(self).__name__, ability, student.name)
        super().__init__(student, teacher)
        self.hidden_truth: Sequence[Annotations | None] = ()
        self.last_labels: tuple[Sequence[View], Sequence[Detections]] = ((), ())

    @property
    def labeling_detector(self) -> Detector:
        """The teacher that labels, or the other member's in its place (IMWA.CROSS_TEACH other)."""
        assert self.teacher is not None, "who calls it has one"
        own: Detector = self.teacher.model
        other = self.other_teacher if self.cross_teach == "other" else None
        return own if other is None else cast(Detector, other)

    def pseudo_losses(
        self, images: list[torch.Tensor], objective: SupervisedLoss
    ) -> dict[str, torch.Tensor]:
        """The student's losses on unlabeled images, which leave its outside state as it was.

        detectron2's dense detectors divide by a running mean of the number of objects: a teacher's
        labels, fewer or more, would scale the losses of labeled images.
        """
        before = self.student.outside_state()
        losses = self.parallel_student(images, objective)
        self.student.load_outside_state(before)
        return losses

    def teach(self, images: list[torch.Tensor], threshold: float) -> list[Detections]:
        """What the teacher finds on images, as far as another member's agrees if it is asked.

        Args:
            images: of weak views.
            threshold: what has a score above it is taught.
        """

        def find(detector: Detector) -> list[Detections]:
            return detector.detect(images)

        return self.agreed_with_other(find(self.labeling_detector), find, threshold)

    def agreed_with_other(
        self,
        detections: list[Detections],
        find: Callable[[Detector], list[Detections]],
        threshold: float,
    ) -> list[Detections]:
        """Detections that the other member's teacher would teach, too (IMWA.CROSS_TEACH agree).

        All of them while there is no other teacher, and without that rule.

        Args:
            detections: of the own teacher on each image.
            find: what another detector finds on the same images.
            threshold: what of the other teacher has a score above it can agree.
        """
        if self.cross_teach != "agree" or self.other_teacher is None:
            return detections
        others = find(cast(Detector, self.other_teacher))
        return [
            agreeing(item, filter_detections(other, threshold))
            for item, other in zip(detections, others, strict=True)
        ]

    @torch.no_grad()
    def record_labels(
        self, part: Part, views: Sequence[View], detections: Sequence[Detections], threshold: float
    ) -> None:
        """Count what the teacher found on unlabeled images, if anybody looks at it.

        Args:
            part: the unlabeled images.
            views: what the teacher saw of each.
            detections: all it found on each view, by falling score.
            threshold: what has a score above it is learned from.
        """
        if self.label_statistics is None:
            return
        passed = [item.scores > threshold for item in detections]
        self.last_labels = (
            views,
            [
                Detections(item.boxes[keep], item.labels[keep], item.scores[keep])
                for item, keep in zip(detections, passed, strict=True)
            ],
        )
        truths = [self.hidden_truth[i] if self.hidden_truth else None for i in part.indices]
        judged: dict[str, torch.Tensor] = {}
        if any(truth is not None for truth in truths):
            stored = [_on_stored_image(*pair) for pair in zip(detections, views, strict=True)]
            judged = vars(judge_labels(stored, truths, passed))
        labels = torch.cat([item.labels for item in detections])
        self.label_statistics.add(
            labels,
            torch.cat([item.scores for item in detections]),
            used=torch.cat(passed),
            images=len(views),
            empty=torch.stack([~keep.any() for keep in passed]).sum(),
            **{name: tensor.to(labels.device) for name, tensor in judged.items()},
        )

    def join(self, ranks: Ranks) -> None:
        super().join(ranks)
        self.student.group = ranks.batch

    def state_dict(self) -> dict[str, Any]:
        return self.student.outside_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_outside_state(state)


def _on_stored_image(detections: Detections, view: View) -> Detections:
    """Detections on a view in pixels of the stored image, on the CPU."""
    boxes = map_boxes(
        detections.boxes.cpu(), torch.linalg.inv(view.matrix), height=math.inf, width=math.inf
    )
    return Detections(boxes, detections.labels.cpu(), detections.scores.cpu())
