"""RandAugment on a batch of images at once, on the device that holds them, pixel by pixel Pillow's.

Every image has operations of its own, and images with the same kind of operation are changed
together. What moves pixels, or maps values by a fixed rule, is looked up in tables that Pillow
itself fills; what depends on the image is computed in the arithmetic of Pillow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ssod_imwa.classification.checks import check_at_least_0, check_at_least_1
from ssod_imwa.classification.data.color_augmentation import groups
from ssod_imwa.classification.data.filters import smooth_means
from ssod_imwa.classification.data.lookup import OnDevices, look_up_pixels, look_up_values
from ssod_imwa.classification.data.randaugment import (
    APPLIED,
    CHANCE,
    GRAY,
    LEVELS,
    NUMBERS,
    OPERATIONS,
    SIGNED,
    Draw,
    apply_operation,
    factor,
)

MAPPING = ("Brightness", "Posterize", "Solarize")
KINDS = ("Identity", "move", "map", "AutoContrast", "Equalize", "Color", "Contrast", "Sharpness")
# Of each of OPERATIONS, as a position in KINDS.
_KIND_OF = torch.tensor(
    [
        KINDS.index("move" if name in SIGNED else "map" if name in MAPPING else name)
        for name in OPERATIONS
    ]
)
# Of red, green and blue in a gray value, times 2^16 (ITU-R 601-2, as Pillow rounds it).
_LUMA = (19595, 38470, 7471)


class BatchedRandAugment:
    """`randaugment` of every image of a batch, by the same numbers.

    Args:
        size: H = W of the images, in pixels.
        cutout: edge of the gray square, in pixels; 0 for none.

    Attributes:
        numbers: uniform numbers that one image takes.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> augment = BatchedRandAugment(8, cutout=4)
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> augment(images, torch.rand(2, augment.numbers, dtype=torch.float64)).shape
        torch.Size([2, 3, 8, 8])
    """

    numbers = NUMBERS

    def __init__(self, size: int, *, cutout: int = 16) -> None:
        check_at_least_1(size=size)
        check_at_least_0(cutout=cutout)
        self.size = size
        self.cutout = cutout
        self._tables = OnDevices(_make_tables(size))

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            images: uint8 (B, 3, size, size), on any device.
            numbers: float64 (B, `numbers`), in [0, 1), in CPU memory.

        Returns:
            A new tensor like `images`.
        """
        images = images.clone()
        draws = numbers[:, :-2].unflatten(1, (APPLIED, 4))
        for operation, chance, level, sign in (draw.unbind(1) for draw in draws.unbind(1)):
            operations = (operation * len(OPERATIONS)).long()
            variants = (operations * LEVELS + (level * LEVELS).long()) * 2 + (sign < 0.5)
            kinds = torch.where(chance < CHANCE, _KIND_OF[operations], 0)
            variants = variants.to(images.device, non_blocking=True)
            for kind, rows in groups(kinds, images.device):
                if kind > 0:
                    changed = self._change(KINDS[kind], images[rows], variants[rows])
                    images.index_copy_(0, rows, changed)
        return cut_gray(images, numbers[:, -2:], length=self.cutout) if self.cutout else images

    def _change(self, kind: str, images: torch.Tensor, variants: torch.Tensor) -> torch.Tensor:
        if kind in ADAPTING:
            return ADAPTING[kind](images)
        tables = self._tables.on(images.device)
        if kind in BLENDING:
            return BLENDING[kind](images, tables.factors[variants])
        if kind == "map":
            return look_up_values(images, tables.values[variants])
        return look_up_pixels(images, tables.sources[variants])


class _Tables(NamedTuple):
    """What each of the V = operations x levels x signs variants does, if it is of the kind."""

    values: torch.Tensor
    """uint8 (V, 256): new for old value."""
    sources: torch.Tensor
    """int32 (V, H * W): 1 + the pixel that comes here, 0 for none."""
    factors: torch.Tensor
    """float32 (V,): of the image in a blend."""


def _make_tables(size: int) -> _Tables:
    """Pillow's results on a row of all values and on an image of pixel numbers."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(3, 0).T[None])
    places = Image.fromarray(np.arange(1, size * size + 1, dtype=np.int32).reshape(size, size))
    values, sources, factors = [], [], []
    for name, level, negative in itertools.product(OPERATIONS, range(1, LEVELS + 1), (False, True)):
        draw = Draw(name, level, negative)
        # Operations that a table is not for have any row in it.
        mapped = apply_operation(ramp, draw) if name in MAPPING else ramp
        moved = apply_operation(places, draw) if name in SIGNED else places
        values.append(np.asarray(mapped)[0, :, 0])
        sources.append(np.asarray(moved).ravel())
        factors.append(factor(level))
    return _Tables(
        torch.from_numpy(np.stack(values)),
        torch.from_numpy(np.stack(sources)),  # Pillow leaves 0 where there is no pixel
        torch.tensor(factors, dtype=torch.float32),
    )


def _blend(images: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Others plus factors, 0..1, times the difference, rounded down, as Pillow blends.

    Args:
        images: uint8 (B, 3, H, W).
        others: float32, of whole numbers, that broadcast to them.
        factors: float32 (B,).
    """
    difference = images.float().sub_(others)
    # Rounded after the product, as Pillow does: a fused multiply-add would round once.
    return difference.mul_(factors[:, None, None, None]).add_(others).to(torch.uint8)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """int32 (B, 1, H, W)."""
    red, green, blue = images.int().unbind(1)
    gray = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000
    return (gray >> 16)[:, None]


def _adjust_color(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _blend(images, _gray(images).float(), factors)


def _adjust_contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    gray = _gray(images)
    # Sums of whole numbers, and the mean in double precision, as in Pillow.
    mean = gray.sum((1, 2, 3), dtype=torch.int64).double() / gray[0].numel()
    mean = (mean + 0.5).floor().float()[:, None, None, None]
    return _blend(images, mean, factors)


def _adjust_sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Towards `smooth_means`; the border stays."""
    if min(images.shape[2:]) <= 2:
        return images
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = smooth_means(smooth)
    return _blend(images, smooth, factors)


def _autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Each channel's values stretched to 0..255."""
    lowest, highest = (bound.double() for bound in torch.aminmax(images.flatten(2), dim=2))
    # A tensor over a tensor: a number over one would be rounded twice.
    scale = torch.full_like(lowest, 255) / (highest - lowest)
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    # Product and sum are rounded one after the other, as in Python.
    mapped = values * scale[..., None] + (-lowest * scale)[..., None]
    flat = (highest <= lowest)[..., None]
    mapped = torch.where(flat, values, mapped).clamp_(0, 255).to(torch.uint8)
    return mapped.gather(2, images.flatten(2).long()).view_as(images)


def _equalize(images: torch.Tensor) -> torch.Tensor:
    """Each channel's values spread so that all occur alike often, as far as may be."""
    pixels = images.flatten(2).long()
    ones = torch.ones_like(pixels, dtype=torch.int32)
    counts = ones.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, ones)
    highest = pixels.amax(2, keepdim=True)
    step = (pixels.shape[2] - counts.gather(2, highest)) // 255
    before = counts.cumsum(2, dtype=torch.int32) - counts
    spread = (before + step // 2) // step.clamp(min=1)
    values = torch.arange(256, dtype=torch.int32, device=images.device)
    mapped = torch.where(step == 0, values, spread).clamp_(0, 255).to(torch.uint8)
    return mapped.gather(2, pixels).view_as(images)


Change = Callable[[torch.Tensor], torch.Tensor]
Blend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ADAPTING: dict[str, Change] = {"AutoContrast": _autocontrast, "Equalize": _equalize}
BLENDING: dict[str, Blend] = {
    "Color": _adjust_color,
    "Contrast": _adjust_contrast,
    "Sharpness": _adjust_sharpness,
}


def cut_gray(images: torch.Tensor, centers: torch.Tensor, *, length: int) -> torch.Tensor:
    """`randaugment.cut_gray` of every image of a batch.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        centers: float64 (B, 2), from left and from top, in [0, 1), in CPU memory.
        length: edge of the square in pixels, at least 1.

    Example:
        >>> images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        >>> cut_gray(images, torch.tensor([[0.9, 0.5]]), length=2)[0, 0].tolist()
        [[0, 0, 0, 0], [0, 0, 127, 127], [0, 0, 127, 127], [0, 0, 127, 127]]
    """
    height, width = images.shape[2:]
    hidden = []
    for center, size in zip(centers.unbind(1), (width, height), strict=True):
        first = (center * size - length / 2).clamp(min=0).long()[:, None]
        pixels = torch.arange(size)
        hidden.append((pixels >= first) & (pixels <= first + length))
    columns, rows = (part.to(images.device, non_blocking=True) for part in hidden)
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], GRAY[0])
