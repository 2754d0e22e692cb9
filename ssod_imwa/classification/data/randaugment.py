"""RandAugment as FixMatch's successors have it, one image at a time in Pillow: the reference.

Two operations of fourteen, drawn with replacement, each applied with probability 1/2 at a strength
of its own, and then a gray square. This is the variant of the public PyTorch codes of FixMatch,
DASO and ACR, which is neither torchvision's nor timm's: their strengths are fixed, every operation
is applied, brightness and the like may also be raised, and nothing is cut out.

    numbers = torch.rand(NUMBERS, dtype=torch.float64)
    image = randaugment(image, numbers.tolist(), cutout=16)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

OPERATIONS = (
    *("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize"),
    *("Rotate", "Sharpness", "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY"),
)
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
APPLIED = 2  # operations of an image
CHANCE = 0.5  # of each to be applied
LEVELS = 9  # 1..9: the public codes' magnitude of 10 is an upper bound that is never drawn
GRAY = (127, 127, 127)

# Uniform numbers that an image takes: operation, whether it is applied, level and sign of each, and
# the center of the square, from left and from top.
NUMBERS = APPLIED * 4 + 2


class Draw(NamedTuple):
    """An operation at a strength; the sign counts for those of `SIGNED`."""

    operation: str
    level: int
    negative: bool


def draws_of(numbers: Sequence[float]) -> list[Draw]:
    """The operations that an image's numbers stand for; those not applied are left out.

    Args:
        numbers: `NUMBERS` of them, in [0, 1).

    Example:
        >>> draws_of([0.5, 0.1, 0.99, 0.2, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0])
        [Draw(operation='Rotate', level=9, negative=True)]
    """
    draws = []
    for first in range(0, 4 * APPLIED, 4):
        operation, chance, level, sign = numbers[first : first + 4]
        if chance < CHANCE:
            name = OPERATIONS[int(operation * len(OPERATIONS))]
            draws.append(Draw(name, 1 + int(level * LEVELS), sign < 0.5))
    return draws


def randaugment(image: Image.Image, numbers: Sequence[float], *, cutout: int = 16) -> Image.Image:
    """An image after its operations and with its gray square.

    Args:
        image: RGB.
        numbers: `NUMBERS` of them, in [0, 1).
        cutout: edge of the square in pixels; 0 for none.
    """
    for draw in draws_of(numbers):
        image = apply_operation(image, draw)
    return cut_gray(image, numbers[-2:], length=cutout) if cutout else image


def apply_operation(image: Image.Image, draw: Draw) -> Image.Image:
    """One operation; what moving uncovers is black, and pixels are the nearest."""
    operation, level, _ = draw
    width, height = image.size
    if operation == "Identity":
        return image
    if operation == "AutoContrast":
        return ImageOps.autocontrast(image)
    if operation == "Equalize":
        return ImageOps.equalize(image)
    if operation == "Posterize":
        return ImageOps.posterize(image, bits(level))
    if operation == "Solarize":
        return ImageOps.solarize(image, threshold(level))
    if operation in ENHANCEMENTS:
        return ENHANCEMENTS[operation](image).enhance(factor(level))
    sign = -1 if draw.negative else 1
    if operation == "Rotate":
        return image.rotate(sign * degrees(level))
    matrices = {
        "ShearX": (1, sign * share(level), 0, 0, 1, 0),
        "ShearY": (1, 0, 0, sign * share(level), 1, 0),
        "TranslateX": (1, 0, sign * int(share(level) * width), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, sign * int(share(level) * height)),
    }
    return image.transform(image.size, Image.Transform.AFFINE, matrices[operation])


ENHANCEMENTS = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}


def factor(level: int) -> float:
    """Of brightness, color, contrast and sharpness: 0.14..0.86, so all only ever fall."""
    return level * 0.9 / 10 + 0.05


def bits(level: int) -> int:
    """That Posterize leaves of each value, 4..7."""
    return int(level * 4 / 10) + 4


def threshold(level: int) -> int:
    """From which Solarize inverts values, 231..26."""
    return 256 - int(level * 256 / 10)


def degrees(level: int) -> int:
    """Of rotations, 3..27."""
    return int(level * 30 / 10)


def share(level: int) -> float:
    """Of shears (pixels for a pixel) and translations (of the edge), 0.03..0.27."""
    return level * 0.3 / 10


def cut_gray(image: Image.Image, center: Sequence[float], *, length: int) -> Image.Image:
    """An image with a gray square, as the public codes draw it.

    At the left and upper edge it is moved inside, at the other two cut off; elsewhere it is one
    pixel larger than `length`, because Pillow's rectangles include their end.

    Args:
        image: RGB.
        center: from left and from top, as shares of the edges, in [0, 1).
        length: edge of the square in pixels, at least 1.
    """
    left, top = (
        int(max(0.0, place * edge - length / 2))
        for place, edge in zip(center, image.size, strict=True)
    )
    right, bottom = (
        min(edge, first + length) for first, edge in zip((left, top), image.size, strict=True)
    )
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), fill=GRAY)
    return image
