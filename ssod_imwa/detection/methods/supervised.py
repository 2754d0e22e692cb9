"""Training on labeled images alone: the baseline of every semi-supervised method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.detection.data.records import Targets, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.objectives import SupervisedLoss
from ssod_imwa.engine.teacher import Teacher


@dataclass(frozen=True)
class SupervisedOptions(Options):
    """How labeled images are trained on."""

    strong_labeled: bool = option(
        True, "train on a strong view of the labeled images beside the weak one"
    )
    ema_decay: float = option(
        0.0,
        "decay of an average of the student that learns nothing and teaches nothing: at a constant "
        "rate the better model; 0 keeps none",
        low=0,
        high=1,
        decay=True,
    )


class Supervised(DetectionMethod):
    """The detector's own losses on labeled images.

    Both views by default, as in Unbiased Teacher, so that the comparison with it differs in the
    unlabeled images alone; with `ema_decay` an average is compared with an average, too.

    Args:
        student: the detector.
        options: see there.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("weak", "strong")}

    def __init__(self, student: Detector, options: SupervisedOptions) -> None:
        decay = options.ema_decay
        super().__init__(student, Teacher(student, decay) if decay > 0 else None)
        self.options = options
        if not options.strong_labeled:
            self.reads = {"labeled": ("weak",)}

    def losses(self, batch: Batch, t: int) -> dict[str, torch.Tensor]:
        images, targets = labeled_views(batch["labeled"], strong=self.options.strong_labeled)
        return self.parallel_student(images, SupervisedLoss(targets))


def labeled_views(part: Part, *, strong: bool) -> tuple[list[torch.Tensor], list[Targets]]:
    """Images and targets of all strong views, if wanted, followed by all weak views.

    Raises:
        ValueError: a view has no targets.
    """
    return images_and_targets([*(part.views["strong"] if strong else ()), *part.views["weak"]])


def images_and_targets(views: Sequence[View]) -> tuple[list[torch.Tensor], list[Targets]]:
    """What a detector learns of views.

    Raises:
        ValueError: a view has no targets.
    """
    targets = [view.targets for view in views if view.targets is not None]
    if len(targets) != len(views):
        raise ValueError(
            f"{len(views) - len(targets)} of {len(views)} labeled views have no targets "
            '(unlabeled images belong into the stream "unlabeled")'
        )
    return [view.image for view in views], targets
