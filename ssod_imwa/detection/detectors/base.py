"""What a detector has to offer to be trained by the methods of this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ssod_imwa.data.structures import Detections, Targets


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
            The scalars `loss_rpn_cls`, `loss_rpn_loc`, `loss_cls` and `loss_box_reg`; every
            trainable parameter receives a gradient from their sum.

        Raises:
            RuntimeError: the detector is in eval mode.
            ValueError: the numbers of images and targets differ, or there is no image.
        """

    @abstractmethod
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Detections of each image, by falling score.

        Runs in eval mode whatever the current mode is, without gradient. An image's detections do
        not depend on the other images, up to the rounding of batched arithmetic.
        """


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and each of its parts back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
