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

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.data.augmentation import (
    BOX_ATTEMPTS,
    Fill,
    Statistics,
    boxes_of,
    crop_and_flip,
    crops_of,
    cut_out,
    normalize,
    resize_and_flip,
    resized,
    standardize,
)
from ssod_imwa.classification.data.auto_augment import CifarAutoAugment
from ssod_imwa.classification.data.batched_randaugment import BatchedRandAugment
from ssod_imwa.classification.data.color_augmentation import ORDERS, jitter, make_gray
from ssod_imwa.classification.data.filters import blur
from ssod_imwa.config.options import Options, option

SmallViewName = Literal["none", "plain", "jittered", "strong", "sim", "weak", "randaugment"]

# Views that are crops of padded images.
PADDED = ("plain", "jittered", "strong", "weak", "randaugment")
# Views that may end with another size than they begin with.
RESIZING = ("none", "weak", "randaugment")

# Cutout's hole for 32 pixels was 16.
HOLE = 1 / 2

JITTERED_JITTER = (0.4, 0.4, 0.4, 0.0)

# The view of contrastive learning (SimCLR, MoCo v2), with the crops of long-tailed work.
SIM_SCALE = (0.2, 1.0)
SIM_JITTER = (0.4, 0.4, 0.4, 0.1)
SIM_JITTER_CHANCE = 0.8
SIM_GRAY_CHANCE = 0.2
SIM_BLUR_CHANCE = 0.5
SIM_BLUR_SIGMA = (0.1, 2.0)  # pixels
SIM_BLUR_RADIUS = 6


@dataclass(frozen=True)
class PaddingOptions(Options):
    """Of views that are crops of padded images."""

    padding: int = option(4, "pixels around images, of which crops are taken", low=0)


@dataclass(frozen=True)
class CutoutOptions(Options):
    """Of FixMatch's strong view."""

    cutout: int = option(16, "edge of the gray square, in pixels; 0 for none", low=0)


class BatchView(Protocol):
    """A batch of images to a batch of network inputs."""

    @property
    def numbers(self) -> int:
        """Uniform numbers in [0, 1) that one image takes."""
        ...

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Transform and normalize.

        Args:
            images: uint8 (B, 3, H, W), RGB, on any device.
            numbers: float64 (B, self.numbers), in [0, 1), in CPU memory.

        Returns:
            float32 (B, 3, H, W), on the device of the images.
        """
        ...


def small_view(
    name: str,
    statistics: Statistics,
    *,
    size: int,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 16,
    stored: int | None = None,
) -> BatchView:
    """The view of a published recipe.

    Args:
        name: "none": normalized alone, for testing. "plain": padded, cropped and mirrored (LDAM).
            "jittered": that, and brightness, contrast and saturation changed (MetaOptNet).
            "strong": "plain", AutoAugment's policy for CIFAR-10 and Cutout (Balanced Meta-Softmax,
            PaCo, NCL). "sim": a part of the image enlarged, mirrored, its colors jittered, made
            gray and blurred, each by chance (second view of PaCo and NCL). "weak": mirrored and
            cropped with a reflected border (FixMatch). "randaugment": that, RandAugment and a gray
            square (FixMatch's strong view, as DASO and ACR have it).
        statistics: to normalize with.
        size: H = W of what the network sees, in pixels.
        padding: of the crops of all but "none" and "sim", in pixels.
        flip: mirror half of the images; False for digits and the like.
        cutout: edge of the square of "randaugment", in pixels.
        stored: H = W of the images, which "none", "weak" and "randaugment" resize at their end
            (DASO's STL-10); None for `size`.

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
    check_at_least_1(size=size)
    if padding < 0:
        raise ValueError(f"padding = {padding} is not allowed (must be at least 0)")
    stored = size if stored is None else stored
    if stored != size and name not in RESIZING:
        raise ValueError(
            f"view {name!r} is not allowed for images of {stored} x {stored} pixels (must be in "
            f"{list(RESIZING)}, or the images {size} x {size})"
        )
    if name in ("weak", "randaugment") and padding >= stored:
        raise ValueError(
            f"padding = {padding} with images of {stored} x {stored} pixels is not allowed (must "
            "be less to reflect)"
        )
    if name == "none":
        return NormalizedView(statistics, size, stored)
    chance = 0.5 if flip else 0.0
    if name == "sim":
        return SimView(statistics, size, flip=chance)
    if name == "randaugment":
        weak = PlainView(statistics, size, stored, padding=padding, flip=chance, fill="reflect")
        return RandAugmentView(weak, cutout=cutout)
    if name == "jittered":
        return JitteredView(statistics, size, padding=padding, flip=chance)
    if name == "strong":
        return StrongView(statistics, size, padding=padding, flip=chance)
    fill: Fill = "reflect" if name == "weak" else "zero"
    return PlainView(statistics, size, stored, padding=padding, flip=chance, fill=fill)


@dataclass(frozen=True)
class NormalizedView:
    """Images as they are."""

    statistics: Statistics
    size: int
    stored: int

    numbers = 0

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Normalize."""
        _check(self, images, numbers, self.stored)
        return normalize(resized(images, self.size), self.statistics)


@dataclass(frozen=True)
class PlainView:
    """Pad with black or a reflection, crop at random and mirror with probability `flip`."""

    statistics: Statistics
    size: int
    stored: int
    padding: int
    flip: float
    fill: Fill

    numbers = 3

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Crop, mirror and normalize."""
        _check(self, images, numbers, self.stored)
        return self.finished(self.cropped(images, numbers))

    def cropped(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Images padded, cropped and mirrored, uint8."""
        crops = crops_of(numbers, padding=self.padding, flip=self.flip)
        return crop_and_flip(images, crops, padding=self.padding, fill=self.fill)

    def finished(self, images: torch.Tensor) -> torch.Tensor:
        """Images in the network's size, normalized."""
        return normalize(resized(images, self.size), self.statistics)


@dataclass(frozen=True)
class JitteredView:
    """Pad with black, crop at random, mirror with probability `flip` and jitter the colors."""

    statistics: Statistics
    size: int
    padding: int
    flip: float

    numbers = 3 + 6

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Crop, mirror, jitter as floating-point numbers, and normalize."""
        _check(self, images, numbers, self.size)
        for_crop, for_jitter = numbers.split([3, 6], dim=1)
        crops = crops_of(for_crop, padding=self.padding, flip=self.flip)
        images = crop_and_flip(images, crops, padding=self.padding).float() / 255
        images = _jitter(images, for_jitter, JITTERED_JITTER, chance=1.0)
        return standardize(images, self.statistics)


class StrongView:
    """Crop and mirror as `PlainView` does, augment, and cut out a black square."""

    def __init__(self, statistics: Statistics, size: int, *, padding: int, flip: float) -> None:
        self.statistics = statistics
        self.size = size
        self.padding = padding
        self.flip = flip
        self.augment = CifarAutoAugment(size)
        self.numbers = 3 + self.augment.numbers + 2

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Crop, mirror, augment, cut out and normalize."""
        _check(self, images, numbers, self.size)
        for_crop, for_policy, for_hole = numbers.split([3, self.augment.numbers, 2], dim=1)
        crops = crops_of(for_crop, padding=self.padding, flip=self.flip)
        images = crop_and_flip(images, crops, padding=self.padding)
        images = self.augment(images, for_policy)
        images = cut_out(images, for_hole, length=int(HOLE * self.size))
        return normalize(images, self.statistics)


class RandAugmentView:
    """Crop and mirror as "weak" does, and RandAugment."""

    def __init__(self, weak: PlainView, *, cutout: int) -> None:
        self.weak = weak
        self.augment = BatchedRandAugment(weak.stored, cutout=cutout)
        self.numbers = weak.numbers + self.augment.numbers

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Crop, mirror, augment, cut out and normalize."""
        _check(self, images, numbers, self.weak.stored)
        images = self.weak.cropped(images, numbers[:, : self.weak.numbers])
        return self.weak.finished(self.augment(images, numbers[:, self.weak.numbers :]))


@dataclass(frozen=True)
class SimView:
    """Enlarge a part, mirror with probability `flip`, jitter, make gray, and blur, by chance."""

    statistics: Statistics
    size: int
    flip: float

    numbers = 2 * BOX_ATTEMPTS + 2 + 1 + 6 + 1 + 2

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Change pixels as floating-point numbers, which are never rounded, and normalize."""
        _check(self, images, numbers, self.size)
        for_box, for_flip, for_jitter, for_gray, for_blur = numbers.split(
            [2 * BOX_ATTEMPTS + 2, 1, 6, 1, 2], dim=1
        )
        boxes = boxes_of(for_box, size=self.size, scale=SIM_SCALE)
        images = resize_and_flip(images.float() / 255, boxes, for_flip[:, 0] < self.flip)
        images = _jitter(images, for_jitter, SIM_JITTER, chance=SIM_JITTER_CHANCE)
        images = make_gray(images, for_gray[:, 0] < SIM_GRAY_CHANCE)
        images = _blur(images, for_blur)
        return standardize(images, self.statistics)


def _jitter(
    images: torch.Tensor, numbers: torch.Tensor, jitters: tuple[float, ...], *, chance: float
) -> torch.Tensor:
    chosen = numbers[:, 0] < chance
    widths = torch.tensor(jitters, dtype=torch.float64)
    middles = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    amounts = middles + (2 * numbers[:, 1:5] - 1) * widths
    orders = (numbers[:, 5] * len(ORDERS)).long()
    return jitter(images, amounts, orders, chosen)


def _blur(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    rows = (numbers[:, 0] < SIM_BLUR_CHANCE).nonzero()[:, 0]
    smallest, largest = SIM_BLUR_SIGMA
    sigmas = smallest + (largest - smallest) * numbers[rows, 1]
    rows = rows.to(images.device, non_blocking=True)
    radius = min(SIM_BLUR_RADIUS, images.shape[-1] - 1)
    return images.index_copy(0, rows, blur(images[rows], sigmas, radius=radius))


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
