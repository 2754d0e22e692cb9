"""Soft Teacher's views: a color change of the labeled images, and strong views that move pixels.

A strong view is resized and mirrored independently of the weak one, then changed by one color
operation and one move in random order, then erased in patches. Its matrix says where every pixel
went, so boxes follow it (see `geometry`).

Source: Soft Teacher (Xu et al., arXiv 2106.09018), section 3.3 and its public code; mmdetection
3.3's lists, where they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from ssod_imwa.config.options import Options, option
from ssod_imwa.data.image_files import from_array
from ssod_imwa.detection.data.geometry import rotation_matrix, shear_matrix, shift_matrix
from ssod_imwa.detection.data.views import WeakView, to_array

Lists = Literal["soft_teacher", "mmdetection"]
ColorChange = Callable[[Image.Image], Image.Image]

COLORS = (
    "identity",
    "auto_contrast",
    "equalize",
    "solarize",
    "saturation",
    "contrast",
    "brightness",
    "sharpness",
    "posterize",
)
ENHANCERS = {
    "saturation": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}
MOVES = {
    "soft_teacher": ("shift_x", "shift_y", "rotate", "shear"),
    "mmdetection": ("shift_x", "shift_y", "rotate", "shear_x", "shear_y"),
}


@dataclass(frozen=True)
class GeometricOptions(Options):
    """INPUT.STRONG of the kind "geometric"."""

    lists: Lists = option(
        "soft_teacher",
        "whose lists of changes: 9 color levels and 4 moves, shears along both axes by a tanh; or "
        "mmdetection's continuous strengths and 5 moves, shears along one axis by a tan",
    )
    max_shift: float = option(
        0.1, "largest translation, as a share of the width or height", low=0, below=1
    )
    max_angle: float = option(30.0, "largest rotation in degrees, either way", low=0, high=180)
    max_shear: float = option(30.0, "largest shear in degrees, either way", low=0, below=90)
    erasing: list[float] = option(
        [1.0, 0.75, 0.5, 0.25],
        "probability of at least one erased patch, of at least two, ...; mmdetection's are 1, 0.8, "
        "0.6, 0.4, 0.2",
        low=0,
        high=1,
    )
    patch_edge: float = option(
        0.2, "largest height and width of a patch, as a share of the image's", low=0, high=1
    )
    fill: int = option(
        125,
        "gray value of patches and of what comes from outside; mmdetection's is 128",
        low=0,
        high=255,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.erasing, reverse=True) != list(self.erasing):
            raise ValueError(f"erasing = {self.erasing} is not allowed (must not rise)")


@dataclass(frozen=True)
class ColoredView:
    """A weak view with one change of its colors: what labeled images are trained on.

    Args:
        weak: resizes and mirrors.
        lists: whose strengths.
    """

    weak: WeakView
    lists: Lists = "soft_teacher"

    def __call__(
        self, image: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a uint8 (3, H, W) image; the matrix maps its pixels to those returned."""
        image, matrix = self.weak(image, generator)
        picture = draw_color_change(generator, self.lists)(Image.fromarray(to_array(image)))
        return from_array(np.array(picture)), matrix


@dataclass(frozen=True)
class GeometricView:
    """A strong view with a geometry of its own.

    Args:
        weak: resizes and mirrors, by draws of its own.
        options: the lists and their bounds.
    """

    weak: WeakView
    options: GeometricOptions = field(default_factory=GeometricOptions)

    def __call__(
        self, image: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a uint8 (3, H, W) image; the matrix maps its pixels to those returned."""
        image, matrix = self.weak(image, generator)
        picture = Image.fromarray(to_array(image))
        for number in generator.permutation(2):
            if number == 0:
                picture = draw_color_change(generator, self.options.lists)(picture)
            else:
                move = draw_move(generator, self.options, *image.shape[-2:])
                picture = move_pixels(picture, move, fill=self.options.fill)
                matrix = move @ matrix
        array = np.array(picture)
        erase_patches_(array, self.options, generator)
        return from_array(array), matrix


def draw_color_change(generator: np.random.Generator, lists: Lists) -> ColorChange:
    """One of `COLORS`, all equally likely, with a random strength u.

    u is one of 0.1, 0.2, ... 0.9 (mmdetection's: uniform in 0..1). "solarize" inverts values from
    256 u, rounded down, on (mmdetection's: not rounded); saturation, contrast, brightness and
    sharpness are multiplied by 0.1 + 1.8 u; "posterize" leaves 4 bits less 4 u, rounded down
    (mmdetection's: 4 u, rounded up).

    Args:
        generator: source of the randomness.
        lists: whose strengths.
    """
    name = COLORS[int(generator.integers(len(COLORS)))]
    if lists == "soft_teacher":
        level = int(generator.integers(1, 10))
        strength, threshold, bits = level / 10, float(256 * level // 10), 4 - 4 * level // 10
    else:
        strength = generator.random()
        threshold, bits = 256 * strength, math.ceil(4 * strength)
    return _color_change(name, factor=0.1 + 1.8 * strength, threshold=threshold, bits=bits)


def _color_change(name: str, *, factor: float, threshold: float, bits: int) -> ColorChange:
    if name in ENHANCERS:
        return lambda picture: ENHANCERS[name](picture).enhance(factor)
    changes: dict[str, ColorChange] = {
        "identity": lambda picture: picture,
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "solarize": lambda picture: ImageOps.solarize(picture, math.ceil(threshold)),
        "posterize": lambda picture: ImageOps.posterize(picture, bits),
    }
    return changes[name]


def draw_move(
    generator: np.random.Generator, options: GeometricOptions, height: int, width: int
) -> torch.Tensor:
    """The matrix of one of `MOVES`, all equally likely, with uniform strengths; see `make_move`."""
    moves = MOVES[options.lists]
    name = moves[int(generator.integers(len(moves)))]
    first, second = generator.uniform(-1, 1, size=2)
    return make_move(name, (first, second), options, height=height, width=width)


def make_move(
    name: str,
    strengths: tuple[float, float],
    options: GeometricOptions,
    *,
    height: int,
    width: int,
) -> torch.Tensor:
    """The matrix of a translation, a rotation about the center or shears about the upper left.

    Args:
        name: one of `MOVES`.
        strengths: -1..1, shares of the largest strength; "shear" takes both, along x and along y.
        options: the largest strengths.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        float64 (3, 3) from pixels before the move to those after it.
    """
    strength, other = strengths
    if name == "shift_x":
        return shift_matrix(strength * options.max_shift * width, 0)
    if name == "shift_y":
        return shift_matrix(0, strength * options.max_shift * height)
    if name == "rotate":
        return rotation_matrix(strength * options.max_angle, (width / 2, height / 2))
    angle = math.radians(options.max_shear)
    if name == "shear":
        # Minus along x, as the public code has it.
        return shear_matrix(math.tanh(-strength * angle), math.tanh(other * angle))
    slope = math.tan(strength * angle)
    return shear_matrix(slope, 0) if name == "shear_x" else shear_matrix(0, slope)


def move_pixels(picture: Image.Image, matrix: torch.Tensor, *, fill: int) -> Image.Image:
    """A picture of the same size whose pixels are moved by an affine matrix, bilinearly.

    Args:
        picture: RGB.
        matrix: (3, 3), from pixels before the move to those after it.
        fill: gray value of what comes from outside.
    """
    # Pillow asks where a pixel comes from; its coordinates are ours, pixel i covers [i, i + 1].
    source = torch.linalg.inv(matrix)[:2].flatten().tolist()
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        source,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(fill, fill, fill),
    )


def erase_patches_(
    array: np.ndarray, options: GeometricOptions, generator: np.random.Generator
) -> None:
    """Fill random patches of a uint8 (H, W, 3) image with gray, in place; boxes stay.

    A patch has the height r H and the width r W, both rounded down, with r uniform.
    """
    height, width = array.shape[:2]
    chance = generator.random()
    for _ in range(sum(chance < probability for probability in options.erasing)):
        share = generator.uniform(0, options.patch_edge)
        h, w = int(share * height), int(share * width)
        top, left = int(generator.integers(height - h)), int(generator.integers(width - w))
        array[top : top + h, left : left + w] = options.fill
