"""Training on labeled images alone: the baseline of every semi-supervised method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssod_imwa.detection.data.records import DetectionBatch, Sample, Targets
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.base import DetectionMethod


class Supervised(DetectionMethod):
    """The detector's own losses on labeled images.

    Args:
        student: the detector.
        strong_labeled: train on the strong view of each image beside the weak one, as Unbiased
            Teacher does, so that the comparison with it differs in the unlabeled images alone.
    """

    def __init__(self, student: Detector, *, strong_labeled: bool = True) -> None:
        super().__init__(student)
        self.strong_labeled = strong_labeled

    def losses(self, batch: DetectionBatch, t: int) -> dict[str, torch.Tensor]:
        return self.parallel_student(*labeled_views(batch.labeled, strong=self.strong_labeled))


def labeled_views(
    samples: Sequence[Sample], *, strong: bool
) -> tuple[list[torch.Tensor], list[Targets]]:
    """Images and targets of all strong views, if wanted, followed by all weak views.

    Raises:
        ValueError: a view has no targets.
    """
    views = [sample.strong for sample in samples] if strong else []
    views += [sample.weak for sample in samples]
    targets = [view.targets for view in views if view.targets is not None]
    if len(targets) != len(views):
        raise ValueError(
            f"{len(views) - len(targets)} of {len(views)} labeled views have no targets "
            "(unlabeled images belong into batch.unlabeled)"
        )
    return [view.image for view in views], targets
