"""What the losses of class-imbalanced classification share.

Logits are (B, C) floating point, labels (B,) int64 in 0..C-1. Half-precision logits are widened to
float32, so that the loss of a large logit neither overflows nor loses the small probabilities; the
result is a scalar of at least float32, the mean over images. What depends on the class frequencies
comes from `class_counts` and lies on the logits' device.

Each file has a loss as a pure function, its options, and a `Criterion` that holds both together
with the class statistics; `build` lists them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ssod_imwa.config.options import Options, option


@dataclass(frozen=True)
class SmoothedOptions(Options):
    """Of a loss that smooths labels."""

    smoothing: list[float] = option(
        [0.0, 0.0],
        "label smoothing of the most and the least frequent class (label_aware_smoothing), or "
        "[that of all classes, 0]",
        low=0,
        below=1,
    )

    def of_all_classes(self) -> float:
        """The smoothing of a loss that treats all classes alike.

        Raises:
            ValueError: it is not one number and a 0.
        """
        if len(self.smoothing) != 2 or self.smoothing[1] != 0:
            raise ValueError(
                f"smoothing = {self.smoothing} is not allowed (must be [share, 0]: all classes are "
                "smoothed alike)"
            )
        return self.smoothing[0]


class Criterion(nn.Module, ABC):
    """From logits and targets to the loss of a method, with its class statistics.

    Args:
        counts: training images of each class.
        options: of the loss.

    Attributes:
        name: that configurations call it by.
        options_class: type of its options.
        of_cosines: whether its logits have to be cosines, which it scales itself.
        takes_shares: whether targets may be (B, C) shares of classes, as mixed images have them.

    Example:
        >>> from ssod_imwa.classification.losses.focal import Focal, FocalOptions
        >>> criterion = Focal([30, 10], FocalOptions(gamma=1.0))
        >>> criterion(torch.zeros(1, 2), torch.tensor([0]), progress=0.0)
        tensor(0.3466)
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Options]] = Options
    of_cosines: ClassVar[bool] = False
    takes_shares: ClassVar[bool] = False

    def __init__(self, counts: Sequence[int], options: Options) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        """The loss of logits (B, C) and labels (B,), or shares (B, C) where they are taken.

        Args:
            logits: of the images.
            targets: of the images.
            progress: the part of the training that is done, in [0, 1).
        """

    def _keep(self, name: str, values: torch.Tensor) -> None:
        """Hold class statistics, which move with the module and are not saved."""
        self.register_buffer(name, values, persistent=False)


def widened(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_over_images(losses: torch.Tensor) -> torch.Tensor:
    """The mean; 0, still connected to the inputs, without images."""
    return losses.sum() / max(len(losses), 1)


def check_one_a_class(name: str, values: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise ValueError if the values are not (C,) for logits (B, C)."""
    if values.shape != logits.shape[1:]:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} do not fit logits of shape"
            f" {tuple(logits.shape)} (must be one number a class)"
        )
