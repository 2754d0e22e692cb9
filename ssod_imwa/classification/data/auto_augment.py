"""AutoAugment's policy for CIFAR-10 on a batch of images at once.

torchvision's transform takes one image, or one choice for all of a batch. Here every image has its
own choice, and images with the same kind of operation are changed together: what moves pixels or
maps values by a fixed rule is looked up in tables that torchvision's own operations fill. Where
torchvision differs from the code in Pillow that long-tailed work uses, this is as that code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as F

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.data.color_augmentation import (
    adjust_contrast,
    adjust_saturation,
    groups,
)
from ssod_imwa.classification.data.filters import adjust_sharpness
from ssod_imwa.classification.data.lookup import OnDevices, look_up_pixels, look_up_values

# 25 pairs of (operation, probability, magnitude 0..9), arXiv 1805.09501, table 7.
POLICIES = AutoAugment(AutoAugmentPolicy.CIFAR10).policies

MAGNITUDES = 10
# What a signed operation does at magnitude 9; its strength grows from 0 in proportion.
STRONGEST = {
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
    "Rotate": 30.0,  # degrees
    "ShearY": 0.3,
    "TranslateX": 150 / 331,  # of the image, whose edge was 331 pixels in the paper
    "TranslateY": 150 / 331,
}
MOVING = ("Rotate", "TranslateX", "TranslateY")
# Operations that map each value on its own.
MAPPING = ("Brightness", "Invert", "Posterize", "Solarize")
BLENDING = {
    "Color": adjust_saturation,
    "Contrast": adjust_contrast,
    "Sharpness": adjust_sharpness,
}
ADAPTING = {"AutoContrast": F.autocontrast, "Equalize": F.equalize}
KINDS = ("move", "map", "ShearY", *BLENDING, *ADAPTING)


class Variant(NamedTuple):
    """An operation and its strength, which has the sign of the draw."""

    operation: str
    strength: float


class CifarAutoAugment:
    """A random one of the 25 pairs of operations for each image, each by its own probability.

    As in the code of most long-tailed work, translations are rounded to whole pixels, shearing is
    bicubic, and Solarize's threshold begins at 256. That code rotates one way only; this, as the
    paper, both ways.

    Args:
        size: H = W of the images, in pixels.
        fill: gray value of what moving uncovers, 0..255. Long-tailed work takes 128.

    Attributes:
        numbers: uniform numbers that one image takes: the pair, whether to apply each of the two,
            and the sign of each.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> augment = CifarAutoAugment(8)
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> augment(images, torch.rand(2, augment.numbers, dtype=torch.float64)).shape
        torch.Size([2, 3, 8, 8])
    """

    numbers = 5

    def __init__(self, size: int, *, fill: int = 128) -> None:
        check_at_least_1(size=size)
        if not 0 <= fill <= 255:
            raise ValueError(f"fill = {fill} is not allowed (must be 0..255)")
        self.fill = fill
        variants, self._choices = _enumerate(size)
        self._probabilities = torch.tensor(
            [[probability for _, probability, _ in pair] for pair in POLICIES], dtype=torch.float64
        )
        self._kinds = torch.tensor([KINDS.index(_kind(variant)) for variant in variants])
        self._tables = OnDevices(_make_tables(variants, size))

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Augment.

        Args:
            images: uint8 (B, 3, size, size), on any device.
            numbers: float64 (B, 5), in [0, 1), in CPU memory.

        Returns:
            A new tensor like `images`.
        """
        images = images.clone()
        pair = (numbers[:, 0] * len(POLICIES)).long()
        applied = numbers[:, 1:3] < self._probabilities[pair]
        signs = (numbers[:, 3:5] >= 0.5).long()
        for place in range(2):
            variants = self._choices[pair, place, signs[:, place]]
            kinds = torch.where(applied[:, place], self._kinds[variants], -1)
            variants = variants.to(images.device, non_blocking=True)
            for kind, rows in groups(kinds, images.device):
                changed = self._change(KINDS[kind], images[rows], variants[rows])
                images.index_copy_(0, rows, changed)
        return images

    def _change(self, kind: str, images: torch.Tensor, variants: torch.Tensor) -> torch.Tensor:
        if kind in ADAPTING:
            return ADAPTING[kind](images)
        tables = self._tables.on(images.device)
        if kind in BLENDING:
            return BLENDING[kind](images, tables.factors[variants])
        if kind == "ShearY":
            return _sheared(images, tables.rows[variants], tables.parts[variants], self.fill)
        if kind == "map":
            return look_up_values(images, tables.values[variants])
        return look_up_pixels(images, tables.sources[variants], fill=self.fill)


class _Tables(NamedTuple):
    """What each of V variants does, if it is of the kind that uses the table."""

    values: torch.Tensor
    """uint8 (V, 256): new for old value."""
    sources: torch.Tensor
    """int64 (V, H * W): 1 + the pixel that comes here, 0 for none."""
    factors: torch.Tensor
    """float64 (V,): of blending."""
    rows: torch.Tensor
    """int64 (V, H, W): the row above the place that is sheared here, -1..H - 1; -2 for none."""
    parts: torch.Tensor
    """float64 (V, H, W): how far below that row it is, 0..1."""


def _kind(variant: Variant) -> str:
    if variant.operation in MOVING:
        return "move"
    return "map" if variant.operation in MAPPING else variant.operation


def _enumerate(size: int) -> tuple[list[Variant], torch.Tensor]:
    """All variants of the policy, and int64 (25, 2, 2): which one (pair, place, sign) means."""
    variants: dict[Variant, int] = {}
    choices = torch.zeros(len(POLICIES), 2, 2, dtype=torch.int64)
    for number, pair in enumerate(POLICIES):
        for place, (operation, _, magnitude) in enumerate(pair):
            for sign in range(2):
                strength = _strength(operation, magnitude or 0, size)
                if operation in STRONGEST and sign == 0:
                    strength = -strength
                variant = Variant(operation, strength)
                choices[number, place, sign] = variants.setdefault(variant, len(variants))
    return list(variants), choices


def _strength(operation: str, magnitude: int, size: int) -> float:
    if operation == "Posterize":  # bits that are left, 8..4
        return 8 - round(4 * magnitude / (MAGNITUDES - 1))
    if operation == "Solarize":  # values from here on are inverted
        return 256 * (1 - magnitude / (MAGNITUDES - 1))
    if operation not in STRONGEST:
        return 0.0
    if operation == "ShearY":
        return STRONGEST[operation] * magnitude / (MAGNITUDES - 1)
    # In float32, as torchvision has them: 0.7 is 0.699999988, which decides what is rounded down.
    strongest = STRONGEST[operation] * (size if operation.startswith("Translate") else 1)
    return torch.linspace(0, strongest, MAGNITUDES)[magnitude].item()


def _make_tables(variants: list[Variant], size: int) -> _Tables:
    values = torch.arange(256, dtype=torch.uint8)[None, None]
    pixels = torch.arange(1, size * size + 1, dtype=torch.float32).reshape(1, 1, size, size)
    mapped = [_mapped(variant, values).flatten() for variant in variants]
    moved = [_moved(variant, pixels).flatten().long() for variant in variants]
    strengths = torch.tensor([variant.strength for variant in variants], dtype=torch.float64)
    # Of the variants that shear; the others' are never read.
    rows, parts = zip(*(_sources(strength, size) for _, strength in variants), strict=True)
    return _Tables(
        torch.stack(mapped),
        torch.stack(moved),
        1 + strengths,
        torch.stack(rows),
        torch.stack(parts),
    )


def _mapped(variant: Variant, values: torch.Tensor) -> torch.Tensor:
    operation, strength = variant
    if operation == "Brightness":
        return F.adjust_brightness(values, 1 + strength)
    if operation == "Posterize":
        return F.posterize(values, int(strength))
    if operation == "Solarize":
        # torchvision refuses thresholds above 255.
        return torch.where(values >= strength, 255 - values, values)
    return F.invert(values)


def _moved(variant: Variant, pixels: torch.Tensor) -> torch.Tensor:
    """Nearest pixels, which moving nothing but whole numbers keeps exact."""
    operation, strength = variant
    if operation == "Rotate":
        return F.rotate(pixels, strength)
    shift = round(strength)
    translate = [shift, 0] if operation == "TranslateX" else [0, shift]
    return F.affine(pixels, translate=translate, shear=[0.0, 0.0], angle=0.0, scale=1.0)


def _sources(shear: float, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a shear along the columns takes each pixel from, as `_Tables` has it."""
    centers = torch.arange(size, dtype=torch.float64) + 0.5
    source = shear * centers[None, :] + centers[:, None]
    inside = (source >= 0) & (source < size)
    above = (source - 0.5).floor()
    return torch.where(inside, above, -2.0).long(), source - 0.5 - above


def _sheared(
    images: torch.Tensor, rows: torch.Tensor, parts: torch.Tensor, fill: int
) -> torch.Tensor:
    """Bicubic between four rows of a column, as Pillow's transform: with a = -1, rounded down."""
    last = images.shape[2] - 1
    columns = images.double()
    four = []
    for step in range(-1, 3):
        source = (rows + step).clamp(0, last)[:, None].expand_as(images)
        four.append(columns.gather(2, source))
    first, second, third, fourth = four
    part = parts[:, None]
    cubic = -first + second - third + fourth
    square = 2 * (first - second) + third - fourth
    values = second + part * (third - first + part * (square + part * cubic))
    values = values.clamp(0, 255).to(images.dtype)
    return values.masked_fill((rows == -2)[:, None], fill)
