"""What a detector has to offer to be trained by the methods of this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ssod_imwa.detection.data.records import Detections, Targets


class Detector(nn.Module, ABC):
    """A detector whose losses and detections do not show which toolkit it is made of.

    Images are uint8 (3, H, W) RGB tensors of any sizes; a detector never resizes them. Boxes are in
    pixels of the given image, labels 0..C-1. Gradients are exchanged by calling the
    DistributedDataParallel wrapper of a detector, so `forward` returns the losses.

    Attributes:
        num_classes: C, without background.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @abstractmethod
    def forward(
        self, images: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> dict[str, torch.Tensor]:
        """Losses of images and their boxes, which may be none.

        Returns:
            Scalars: `loss_cls` and `loss_box_reg`; two-stage detectors have `loss_rpn_cls` and
            `loss_rpn_loc`, too, and FCOS has `loss_centerness`. Every trainable parameter receives
            a gradient from their sum.

        Raises:
            RuntimeError: the detector is in eval mode.
            ValueError: the numbers of images and targets differ, or there is no image.
        """

    def check_losses(self, images: Sequence[torch.Tensor], targets: Sequence[Targets]) -> None:
        """Raise what `forward` raises for wrong arguments or in eval mode."""
        if not self.training:
            raise RuntimeError("losses need training mode (call train(), or detect() for boxes)")
        if len(images) != len(targets) or not images:
            raise ValueError(
                f"{len(images)} images and {len(targets)} targets are not allowed "
                "(must be equal and at least 1)"
            )

    def outside_state(self) -> dict[str, float]:
        """Numbers that losses depend on and that the state dict does not hold, by name."""
        return {}

    def load_outside_state(self, state: dict[str, float]) -> None:
        """Restore what `outside_state` returned."""
        if state:
            raise KeyError(f"{type(self).__name__} has no such state: {sorted(state)}")

    @abstractmethod
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Detections of each image, by falling score.

        Runs in eval mode whatever the current mode is, without gradient. An image's detections do
        not depend on the other images, up to the rounding of batched arithmetic.
        """


def padded_size(images: Iterable[torch.Tensor], divisor: int) -> tuple[int, int]:
    """Height and width that hold every image, rounded up to multiples of a divisor."""
    heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
    return tuple(-(-max(sizes) // divisor) * divisor for sizes in (heights, widths))


def groups_of_equal_size(images: Sequence[torch.Tensor], divisor: int) -> list[list[int]]:
    """Numbers of the images that may share a batch.

    Padding changes what is found, because a padded border is no longer zero behind the first layer:
    only images of equal padded size are detected together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(padded_size([image], divisor), []).append(index)
    return list(groups.values())
