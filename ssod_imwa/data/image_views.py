"""Random views of small images, whole batches at once, on the device that holds them.

    view = small_view("plain", CIFAR_STATISTICS, size=32)
    numbers = counted_generator(seed, "view", member, t).random((len(images), view.numbers))
    inputs = view(images, torch.from_numpy(numbers))

A view draws nothing itself: image b of the result is a function of image b and of row b of the
numbers, on every device and in a batch of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from ssod_imwa.data.image_augmentation import Statistics, crop_and_flip, crops_of, normalise

SmallViewName = Literal["none", "plain"]


class BatchView(Protocol):
    """A batch of images to a batch of network inputs."""

    @property
    def numbers(self) -> int:
        """Uniform numbers in [0, 1) that one image takes."""
        ...

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Transform and normalise.

        Args:
            images: uint8 (B, 3, H, W), RGB, on any device.
            numbers: float64 (B, self.numbers), in [0, 1), in CPU memory.

        Returns:
            float32 (B, 3, H, W), on the device of the images.
        """
        ...


def small_view(
    name: str, statistics: Statistics, *, size: int, padding: int = 4, flip: bool = True
) -> BatchView:
    """The view of a published recipe.

    Args:
        name: "none": normalised alone, for testing. "plain": padded, cropped and mirrored (LDAM).
        statistics: to normalise with.
        size: H = W of the images, in pixels.
        padding: of the crops of "plain", in pixels.
        flip: mirror half of the images; False for digits and the like.

    Raises:
        ValueError: the name is not known or a number is out of range.

    Example:
        >>> view = small_view("plain", Statistics((0.5,) * 3, (0.5,) * 3), size=8)
        >>> numbers = torch.rand(2, view.numbers, dtype=torch.float64)
        >>> view(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), numbers).unique().tolist()
        [-1.0]
    """
    names = list(get_args(SmallViewName))
    if name not in names:
        raise ValueError(f"view {name!r} is not allowed for images in memory (must be in {names})")
    if size < 1:
        raise ValueError(f"size = {size} is not allowed (must be at least 1)")
    if padding < 0:
        raise ValueError(f"padding = {padding} is not allowed (must be at least 0)")
    if name == "none":
        return NormalisedView(statistics, size)
    return PlainView(statistics, size, padding=padding, flip=0.5 if flip else 0.0)


@dataclass(frozen=True)
class NormalisedView:
    """Images as they are."""

    statistics: Statistics
    size: int

    numbers = 0

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        _check(self, images, numbers, self.size)
        return normalise(images, self.statistics)


@dataclass(frozen=True)
class PlainView:
    """Pad with black, crop at random and mirror with probability `flip`."""

    statistics: Statistics
    size: int
    padding: int
    flip: float

    numbers = 3

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Crop, mirror and normalise."""
        _check(self, images, numbers, self.size)
        crops = crops_of(numbers, padding=self.padding, flip=self.flip)
        return normalise(crop_and_flip(images, crops, padding=self.padding), self.statistics)


def _check(view: BatchView, images: torch.Tensor, numbers: torch.Tensor, size: int) -> None:
    count, _, height, width = images.shape
    if (height, width) != (size, size):
        raise ValueError(
            f"images of {width} x {height} pixels are not allowed (must be {size} x {size})"
        )
    if numbers.shape != (count, view.numbers):
        raise ValueError(
            f"numbers of shape {tuple(numbers.shape)} are not allowed (must be {count} images x "
            f"{view.numbers})"
        )
