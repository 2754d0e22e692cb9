"""Augmentation of a batch of small images at once, on the device that holds them.

    generator = counted_generator(seed, "crops", member, t)
    images = dataset.images[batch]  # uint8 (B, 3, H, W)
    crops = crops_of(torch.from_numpy(generator.random((len(batch), 3))), padding=4)
    inputs = normalize(crop_and_flip(images, crops, padding=4), CIFAR_STATISTICS)

The few random numbers are drawn on the CPU, so every device sees the same images.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import resize

from ssod_imwa.classification.checks import check_choice

Fill = Literal["zero", "reflect"]


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, of values 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# CIFAR-10-LT and CIFAR-100-LT alike, as in the code of LDAM and most that followed.
CIFAR_STATISTICS = Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
# ImageNet-LT and Places-LT.
IMAGENET_STATISTICS = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Crops(NamedTuple):
    """Where the crop of each image begins in the padded image, and whether it is mirrored."""

    top: torch.Tensor
    """int64 (B,), 0..2 padding."""
    left: torch.Tensor
    """int64 (B,), 0..2 padding."""
    mirrored: torch.Tensor
    """bool (B,)."""


def crops_of(numbers: torch.Tensor, *, padding: int = 4, flip: float = 0.5) -> Crops:
    """The crop and flip that three uniform numbers stand for: top, left, mirrored.

    With numbers of a generator counted by (seed, member, t), image b's crop is a function of
    (seed, member, t, slot), whatever the batch size is.

    Args:
        numbers: float64 (B, 3), in [0, 1).
        padding: pixels on each side, at least 0.
        flip: probability of mirroring, 0..1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> crops = crops_of(torch.tensor([[0.0, 0.5, 0.99]]), padding=4)
        >>> crops.top.item(), crops.left.item(), crops.mirrored.item()
        (0, 4, False)
    """
    if padding < 0:
        raise ValueError(f"padding = {padding} is not allowed (must be at least 0)")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip = {flip} is not allowed (must be 0..1)")
    top, left = (numbers[:, :2] * (2 * padding + 1)).long().unbind(1)
    return Crops(top, left, numbers[:, 2] < flip)


def crop_and_flip(
    images: torch.Tensor, crops: Crops, *, padding: int = 4, fill: Fill = "zero"
) -> torch.Tensor:
    """Pad, crop to the old size and mirror left to right; a new tensor of the same type.

    Mirroring before the crop, as semi-supervised methods do, has the same distribution.

    Args:
        images: (B, 3, H, W) of any type, on any device.
        crops: of the B images.
        padding: what `crops` was drawn with.
        fill: "zero" (black), or "reflect" without repeating the border, for padding < H, W.

    Raises:
        ValueError: sizes do not fit, or the fill is not known.

    Example:
        >>> images = torch.arange(4).reshape(1, 1, 1, 4)
        >>> crops = Crops(torch.tensor([1]), torch.tensor([0]), torch.tensor([False]))
        >>> crop_and_flip(images, crops, padding=1).tolist()
        [[[[0, 0, 1, 2]]]]
    """
    check_choice("fill", fill, get_args(Fill))
    count, _, height, width = images.shape
    if len(crops.top) != count:
        raise ValueError(
            f"{len(crops.top)} crops for {count} images are not allowed (must be equal)"
        )
    if fill == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"padding = {padding} with images of {width} x {height} is not allowed (must be less "
            "than both to reflect)"
        )
    top, left, mirrored = (part.to(images.device, non_blocking=True) for part in crops)
    # Views of every crop, (B, 3, 2p + 1, 2p + 1, H, W), of which each image copies one.
    windows = _pad(images, padding, fill).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(count, device=images.device), :, top, left]
    return torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)


def cut_out(images: torch.Tensor, numbers: torch.Tensor, *, length: int) -> torch.Tensor:
    """Images with a black square each, whose center is any pixel: at the border it is smaller.

    Args:
        images: (B, 3, H, W) of any type, on any device.
        numbers: (B, 2), in [0, 1), in CPU memory: row and column of the center.
        length: edge of the square in pixels, at least 0.

    Source: Cutout (DeVries and Taylor, arXiv 1708.04552).

    Example:
        >>> images = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        >>> cut_out(images, torch.tensor([[0.5, 0.0]]), length=2)[0, 0].tolist()
        [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    """
    hidden = []
    for number, size in zip(numbers.unbind(1), images.shape[2:], strict=True):
        first = (number * size).long()[:, None] - length // 2
        pixels = torch.arange(size)
        hidden.append((pixels >= first) & (pixels < first + length))
    rows, columns = (part.to(images.device, non_blocking=True) for part in hidden)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0)


class Boxes(NamedTuple):
    """A part of each image, int64 (B,) each, in pixels."""

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor


# Boxes that do not fit are drawn again so often, as in torchvision; then the whole image is taken.
BOX_ATTEMPTS = 10


def boxes_of(
    numbers: torch.Tensor,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Boxes:
    """The parts of square images that 22 uniform numbers stand for: ten tries, and a place.

    A try is an area and an aspect ratio, uniform in its logarithm. The first that fits counts.

    Args:
        numbers: float64 (B, 22), in [0, 1).
        size: H = W of the images, in pixels.
        scale: smallest and largest area, as parts of the image's.
        ratio: smallest and largest width over height.

    Source: torchvision's RandomResizedCrop, after Inception's crops (arXiv 1409.4842, section 6).

    Example:
        >>> numbers = torch.full((1, 22), 0.5, dtype=torch.float64)
        >>> [part.item() for part in boxes_of(numbers, size=10, scale=(0.1, 0.4))]
        [3, 3, 5, 5]
    """
    tries = numbers[:, : 2 * BOX_ATTEMPTS].unflatten(1, (BOX_ATTEMPTS, 2))
    area = size**2 * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    first, last = (math.log(bound) for bound in ratio)
    aspect = torch.exp(first + (last - first) * tries[..., 1])
    sizes = torch.stack([torch.sqrt(area / aspect), torch.sqrt(area * aspect)], -1).round()
    fits = ((sizes > 0) & (sizes <= size)).all(-1)
    chosen = sizes[torch.arange(len(sizes)), fits.int().argmax(1)]
    sides = torch.where(fits.any(1, keepdim=True), chosen, size)
    corners = (numbers[:, 2 * BOX_ATTEMPTS :] * (size - sides + 1)).long()
    return Boxes(*corners.unbind(1), *sides.long().unbind(1))


def resize_and_flip(images: torch.Tensor, boxes: Boxes, mirrored: torch.Tensor) -> torch.Tensor:
    """Enlarge a part of each image to the whole, bilinearly, and mirror some left to right.

    Parts are not larger than images, so nothing is averaged (no antialiasing). Pixels beyond the
    part do not count, as if it were cut out first.

    Args:
        images: float32 (B, 3, H, W).
        boxes: of the B images, in CPU memory.
        mirrored: bool (B,), in CPU memory.

    Example:
        >>> images = torch.tensor([0.0, 4.0, 9.0, 9.0])[None, None, None]
        >>> boxes = Boxes(*(torch.tensor([x]) for x in (0, 0, 1, 2)))
        >>> resize_and_flip(images, boxes, torch.tensor([False])).flatten()
        tensor([0., 1., 3., 4.])
    """
    height, width = images.shape[2:]
    y = _sampled(boxes.top, boxes.height, height)
    x = _sampled(boxes.left, boxes.width, width)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    y, x = (part.float().to(images.device, non_blocking=True) for part in (y, x))
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _sampled(first: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Where `size` pixels of the result lie along an axis of the image, -1..1, float64 (B, size).

    The centers of result pixels, in pixels of the part, are kept between its outer centers.
    """
    first, length = first[:, None].double(), length[:, None].double()
    centers = (torch.arange(size) + 0.5) * length / size - 0.5
    centers = first + torch.minimum(centers.clamp(min=0), length - 1)
    return (2 * centers + 1) / size - 1


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images at another size, as Pillow's bilinear resizing within one level of 255.

    Args:
        images: uint8 (B, 3, H, W); those of the size are returned as they are.
        size: H = W of the result, in pixels.

    Example:
        >>> images = torch.tensor([0, 0, 8, 8], dtype=torch.uint8).expand(1, 1, 4, 4)
        >>> resized(images, 2).tolist()
        [[[[1, 7], [1, 7]]]]
    """
    if images.shape[2:] == (size, size):
        return images
    # Not as integers, which a GPU would round otherwise.
    result = resize(images.float(), [size, size], antialias=True)
    return result.round_().clamp_(0, 255).to(torch.uint8)


def normalize(images: torch.Tensor, statistics: Statistics = CIFAR_STATISTICS) -> torch.Tensor:
    """(x / 255 - mean) / std of each channel, float32 of the same shape.

    Args:
        images: uint8 (B, 3, H, W).
        statistics: of the data set.

    Raises:
        ValueError: the images are not uint8.

    Example:
        >>> black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        >>> normalize(black, Statistics((0.5, 0.5, 0.2), (0.5, 0.25, 0.1))).flatten().tolist()
        [-1.0, -2.0, -2.0]
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images of {images.dtype} are not allowed (must be torch.uint8, 0..255)")
    scale, shift = _scale_and_shift(statistics, 255, images.device)
    return images.float().mul_(scale).sub_(shift)


def standardize(images: torch.Tensor, statistics: Statistics = CIFAR_STATISTICS) -> torch.Tensor:
    """(x - mean) / std of each channel; `normalize` for values of 0..1.

    Args:
        images: float32 (B, 3, H, W).
        statistics: of the data set.

    Example:
        >>> standardize(torch.ones(1, 3, 1, 1), Statistics((0.5, 0, 0), (0.5, 1, 2))).flatten()
        tensor([1.0000, 1.0000, 0.5000])
    """
    scale, shift = _scale_and_shift(statistics, 1, images.device)
    return (images * scale).sub_(shift)


@lru_cache(maxsize=16)
def _scale_and_shift(
    statistics: Statistics, largest: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / (largest std) and mean / std; kept, because a copy to a GPU would wait for it."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in statistics)
    parts = (1 / (largest * std), mean / std)
    scale, shift = (part.float().to(device)[:, None, None] for part in parts)
    return scale, shift


def _pad(images: torch.Tensor, padding: int, fill: Fill) -> torch.Tensor:
    if fill == "zero":
        return F.pad(images, (padding,) * 4)
    # By index, because PyTorch does not reflect integers.
    for dim in (2, 3):
        size = images.shape[dim]
        index = torch.arange(-padding, size + padding, device=images.device).abs()
        images = images.index_select(dim, torch.where(index < size, index, 2 * (size - 1) - index))
    return images
