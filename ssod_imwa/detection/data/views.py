"""Weak and strong views of an image, each a function of an explicit generator.

A view carries the 3x3 matrix from pixels of the stored image to its own (see `geometry`). Boxes
follow the matrix, so a view may move pixels in any way that a matrix can express.

Backends were chosen by measurement (benchmarks/data_loading.py): decoding, color and blur run in
Pillow, which is also what Unbiased Teacher's transforms run on; resizing runs in torch on
interleaved channels. Images therefore stay interleaved in memory until they are packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from ssod_imwa.config.options import Options, option
from ssod_imwa.data.image_files import check_size, from_array, read_image
from ssod_imwa.data.streams import Views, make_views
from ssod_imwa.detection.data.geometry import (
    flip_matrix,
    is_identity,
    map_targets,
    resized_shape,
    scale_matrix,
)
from ssod_imwa.detection.data.records import ImageRecord, View

# ColorJitter(0.4, 0.4, 0.4, 0.1) and GaussianBlur of Unbiased Teacher.
JITTER_FACTOR = (0.6, 1.4)
JITTER_HUE = (-0.1, 0.1)
BLUR_RADIUS = (0.1, 2.0)
# Area as a fraction of the image and height over width of the three erased rectangles.
ERASING_AREA = ((0.05, 0.2), (0.02, 0.2), (0.02, 0.2))
ERASING_ASPECT = ((0.3, 3.3), (0.1, 6.0), (0.05, 8.0))
# A rectangle that does not fit is drawn again this often, then left out, as in torchvision.
ERASING_ATTEMPTS = 10


Sampling = Literal["choice", "range"]


@dataclass(frozen=True)
class ViewOptions(Options):
    """INPUT: the geometry of views."""

    min_size_train: list[int] = option(
        [640, 672, 704, 736, 768, 800],
        "shortest edge in pixels, drawn from this list for each training image",
        low=1,
        per_member=True,
    )
    min_size_train_sampling: Sampling = option(
        "choice",
        '"choice" draws one of MIN_SIZE_TRAIN, "range" a whole number between its two',
        per_member=True,
    )
    max_size_train: int = option(
        1333, "bound of the longest edge in pixels, in training", low=1, per_member=True
    )
    min_size_test: int = option(800, "shortest edge in pixels, in evaluation", low=1)
    max_size_test: int = option(1333, "bound of the longest edge in pixels, in evaluation", low=1)
    random_flip: Literal["horizontal", "none"] = option(
        "horizontal", "mirror training images with probability 1/2", per_member=True
    )


@dataclass(frozen=True)
class StrongKindOptions(Options):
    """INPUT.STRONG: whose strong views."""

    kind: Literal["photometric", "geometric"] = option(
        "photometric",
        '"photometric" changes the colors of the weak view (Unbiased, Dense Teacher), "geometric" '
        "is resized and mirrored by itself and moved, too (Soft Teacher)",
    )


@dataclass(frozen=True)
class StrongOptions(Options):
    """INPUT.STRONG: probabilities of the photometric view's operations, in this order."""

    color_jitter: float = option(0.8, "probability of color jitter", low=0, high=1)
    grayscale: float = option(0.2, "probability of grayscale", low=0, high=1)
    gaussian_blur: float = option(0.5, "probability of Gaussian blur", low=0, high=1)
    erasing: list[float] = option(
        [0.7, 0.5, 0.3], "probability of each of three rectangles of noise", low=0, high=1
    )
    bgr_as_rgb: bool = option(
        False, "run the color operations on BGR pixels as if they were RGB, as the public code does"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.erasing) != len(ERASING_AREA):
            raise ValueError(
                f"erasing = {self.erasing} is not allowed (must be {len(ERASING_AREA)} "
                "probabilities)"
            )


def read_record(record: ImageRecord) -> torch.Tensor:
    """Decode a record's image and check its size.

    Raises:
        DataError: the image cannot be read, or its size is not the record's; boxes and orientation
            groups would then be wrong.
    """
    image = read_image(record.file_name)
    height, width = image.shape[-2:]
    check_size(record.file_name, (width, height), (record.width, record.height))
    return image


def to_array(image: torch.Tensor) -> np.ndarray:
    """(H, W, 3) without a copy if the image is interleaved already."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _resize(
    image: torch.Tensor, *, min_size: int, max_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = image.shape[-2:]
    shape = resized_shape(height, width, min_size=min_size, max_size=max_size)
    matrix = scale_matrix(shape[1] / width, shape[0] / height)
    return F.resize(image, list(shape), antialias=True), matrix


class ImageTransform(Protocol):
    """Draws its parameters from the generator; returns the image and the matrix of its geometry.

    Those of tests draw nothing and get None in place of a generator.
    """

    def __call__(self, image: torch.Tensor, generator: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a uint8 (3, H, W) image; the matrix maps its pixels to those returned."""


@dataclass(frozen=True)
class WeakView:
    """Random resize and horizontal flip.

    Args:
        min_sizes: lengths in pixels, one of which is drawn for the shortest edge.
        max_size: bound of the longest edge in pixels; the aspect ratio is kept.
        flip: mirror with probability 1/2.
        sampling: "choice" draws one of the lengths, "range" a whole number from the first of two to
            the second.
    """

    min_sizes: Sequence[int]
    max_size: int
    flip: bool = True
    sampling: Sampling = "choice"

    def __post_init__(self) -> None:
        if not len(self.min_sizes):
            raise ValueError("min_sizes is empty (at least one length is needed)")
        for size in self.min_sizes:
            _check_sizes(size, self.max_size)
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"sampling = {self.sampling!r} is not allowed (choice or range)")
        if self.sampling == "range" and (
            len(self.min_sizes) != 2 or self.min_sizes[0] > self.min_sizes[1]
        ):
            raise ValueError(
                f"min_sizes = {list(self.min_sizes)} is not allowed with the sampling 'range' "
                "(must be two lengths, the smaller one first)"
            )
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip = {self.flip!r} is not allowed (must be True or False)")

    def __call__(
        self, image: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a uint8 (3, H, W) image; the matrix maps its pixels to those returned."""
        min_size = self._draw_size(generator)
        image, matrix = _resize(image, min_size=min_size, max_size=self.max_size)
        if self.flip and generator.random() < 0.5:
            image, matrix = image.flip(-1), flip_matrix(image.shape[-1]) @ matrix
        return image, matrix

    def _draw_size(self, generator: np.random.Generator) -> int:
        if self.sampling == "range":
            return int(generator.integers(self.min_sizes[0], self.min_sizes[1] + 1))
        return self.min_sizes[int(generator.integers(len(self.min_sizes)))]


@dataclass(frozen=True)
class TestView:
    """Resize to a fixed shortest edge; for evaluation.

    Args:
        min_size: length of the shortest edge in pixels.
        max_size: bound of the longest edge in pixels; the aspect ratio is kept.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    min_size: int
    max_size: int

    def __post_init__(self) -> None:
        _check_sizes(self.min_size, self.max_size)

    def __call__(
        self, image: torch.Tensor, generator: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize a uint8 (3, H, W) image; the matrix maps its pixels to those returned."""
        return _resize(image, min_size=self.min_size, max_size=self.max_size)


@dataclass(frozen=True)
class StrongView:
    """Unbiased Teacher's photometric operations, on top of the weak view.

    In this order: color jitter (brightness, contrast and saturation times U[0.6, 1.4], hue plus
    U[-0.1, 0.1] of the color circle, in random order), grayscale, Gaussian blur with a radius of
    U[0.1, 2] pixels, and three rectangles of noise whose areas and aspect ratios are
    `ERASING_AREA` and `ERASING_ASPECT` (aspect log-uniform). Boxes stay, also under a rectangle.
    The noise is uniform over 0..255 for every pixel and channel.

    Args:
        options: how likely each of them is.
    """

    options: StrongOptions = field(default_factory=StrongOptions)

    def __call__(
        self, image: torch.Tensor, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform a uint8 (3, H, W) image; the geometry, and so the matrix, is the identity."""
        array = to_array(image)
        operations = self._draw_color_operations(generator)
        if operations:
            order = slice(None, None, -1 if self.options.bgr_as_rgb else 1)
            picture = Image.fromarray(np.ascontiguousarray(array[..., order]))
            for operation in operations:
                picture = operation(picture)
            array = np.asarray(picture)[..., order]
        array = array.copy()  # never the weak view's memory, nor Pillow's read-only one
        for probability, area, aspect in zip(
            self.options.erasing, ERASING_AREA, ERASING_ASPECT, strict=True
        ):
            if generator.random() < probability:
                erase_(array, area=area, aspect=aspect, generator=generator)
        return from_array(array), torch.eye(3, dtype=torch.float64)

    def _draw_color_operations(
        self, generator: np.random.Generator
    ) -> list[Callable[[Image.Image], Image.Image]]:
        operations: list[Callable[[Image.Image], Image.Image]] = []
        if generator.random() < self.options.color_jitter:
            operations += draw_color_jitter(generator)
        if generator.random() < self.options.grayscale:
            operations.append(lambda picture: F.rgb_to_grayscale(picture, 3))
        if generator.random() < self.options.gaussian_blur:
            blur = ImageFilter.GaussianBlur(generator.uniform(*BLUR_RADIUS))
            operations.append(lambda picture: picture.filter(blur))
        return operations


def draw_color_jitter(
    generator: np.random.Generator,
) -> list[Callable[[Image.Image], Image.Image]]:
    """Brightness, contrast, saturation and hue changes of random strength in random order."""
    brightness, contrast, saturation = generator.uniform(*JITTER_FACTOR, size=3)
    hue = generator.uniform(*JITTER_HUE)
    operations: list[Callable[[Image.Image], Image.Image]] = [
        lambda picture: F.adjust_brightness(picture, brightness),
        lambda picture: F.adjust_contrast(picture, contrast),
        lambda picture: F.adjust_saturation(picture, saturation),
        lambda picture: F.adjust_hue(picture, hue),
    ]
    return [operations[i] for i in generator.permutation(len(operations))]


def draw_rectangle(
    height: int,
    width: int,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """A random rectangle inside an image, as torchvision's RandomErasing draws it.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        area: bounds of the area as a fraction of the image, drawn uniformly.
        aspect: bounds of height over width, drawn log-uniformly.
        generator: source of the randomness.

    Returns:
        top, left, height and width in pixels, or None if `ERASING_ATTEMPTS` draws did not fit.
    """
    for _ in range(ERASING_ATTEMPTS):
        pixels = generator.uniform(*area) * height * width
        ratio = math.exp(generator.uniform(*np.log(aspect)))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            top = int(generator.integers(height - h + 1))
            left = int(generator.integers(width - w + 1))
            return top, left, h, w
    return None


def erase_(
    array: np.ndarray,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> None:
    """Fill a random rectangle of a uint8 (H, W, 3) image with noise, in place."""
    rectangle = draw_rectangle(*array.shape[:2], area=area, aspect=aspect, generator=generator)
    if rectangle is not None:
        top, left, h, w = rectangle
        noise = generator.integers(256, size=(h, w, 3), dtype=np.uint8)
        array[top : top + h, left : left + w] = noise


def make_record_views(
    record: ImageRecord, views: Views, generator: np.random.Generator | None
) -> dict[str, View]:
    """Read an image and make its views.

    A view's matrix is the product of its own geometry and that of the view which it is made `On`.
    If it does not move that one's pixels, both hold the same targets.

    Args:
        record: what to read; without annotations the views have no targets.
        views: see `Stream`; transforms as `ImageTransform`.
        generator: source of all randomness of this image, used in the order of the views; None for
            transforms that draw nothing.

    Raises:
        DataError: the image cannot be read or has another size than the record says.
    """

    def transform(number: int, change: ImageTransform, base: View) -> View:
        image, step = change(base.image, generator)
        matrix = step @ base.matrix
        if record.annotations is None:
            return View(image, matrix, None)
        if base.targets is not None and is_identity(step):
            return View(image, matrix, base.targets)
        height, width = image.shape[-2:]
        targets = map_targets(record.annotations, matrix, height=height, width=width)
        return View(image, matrix, targets)

    stored = View(read_record(record), torch.eye(3, dtype=torch.float64), None)
    return make_views(views, stored, transform)


def _check_sizes(min_size: int, max_size: int) -> None:
    if min_size < 1 or max_size < min_size:
        raise ValueError(
            f"min_size = {min_size} with max_size = {max_size} is not allowed "
            "(must be 1 <= min_size <= max_size)"
        )
