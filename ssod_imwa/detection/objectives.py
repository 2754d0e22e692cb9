"""What a student learns from a batch of images: losses computed from its detector's parts.

A new way to train writes a class here (or beside its method) and no line in any detector::

    class SoftLoss:
        def __init__(self, targets, weights): ...

        def __call__(self, parts):
            proposals, losses = parts.regions.propose(self.targets)
            ...
            return losses

    losses = method.parallel_student(images, SoftLoss(targets, weights))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.parts import Parts


@dataclass(frozen=True)
class SupervisedLoss:
    """The detector's own losses.

    Attributes:
        targets: the boxes of each image, which may be none.
    """

    targets: Sequence[Targets]

    def __call__(self, parts: Parts) -> dict[str, torch.Tensor]:
        return parts.losses(self.targets)
