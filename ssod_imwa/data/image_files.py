"""Which files are images, whether they are whole, their size without decoding, their pixels."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ssod_imwa.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What Pillow raises on files that are missing, truncated, or not what their header says.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# The last bytes of a whole file: JPEG's end of image, PNG's IEND chunk.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height (EXIF 2.3, table 4)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once its EXIF orientation is applied."""
    width, height = image.size
    if image.getexif().get(_EXIF_ORIENTATION, 1) in _SIDEWAYS:
        return height, width
    return width, height


def image_size(path: str | Path, *, whole: bool = False) -> tuple[int, int]:
    """Width and height in pixels of an image file, read from its header alone.

    Args:
        path: of the file.
        whole: make sure that a JPEG or PNG was not cut off. Only a file that does not end as its
            format demands (bytes may follow the image) is decoded, so it takes 0.1 ms an image.

    Raises:
        DataError: the file is missing, no image or, for `whole`, cut off.
    """
    try:
        with Image.open(path) as image:
            size = upright_size(image)
            ending = _ENDINGS.get(image.format or "") if whole else None
            if ending is not None and not _ends_with(path, ending):
                image.load()
            return size
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path} cannot be read: {reason}") from error


def check_size(path: str | Path, found: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Refuse an image whose size is not what its annotations say.

    Raises:
        DataError: the sizes differ; boxes and orientation groups would be wrong.
    """
    if found != annotated:
        raise DataError(
            f"image {path} is {found[0]} x {found[1]} pixels (EXIF orientation applied), but its "
            f"annotations say {annotated[0]} x {annotated[1]}; correct the annotations"
        )


def _ends_with(path: str | Path, ending: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(ending), os.SEEK_END)
        return file.read() == ending


def read_image(path: str) -> torch.Tensor:
    """Decode an image file, upright.

    EXIF orientation is applied. Grayscale, palette and CMYK images are converted, transparency is
    dropped, and of 16-bit channels the high byte is kept.

    Args:
        path: any format that Pillow reads.

    Returns:
        uint8 (3, H, W), RGB, interleaved in memory.

    Raises:
        DataError: the file is missing, damaged or has floating-point pixels.
    """
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            array = np.array(_to_rgb(image))
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path} cannot be read: {reason}") from error
    return from_array(array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would saturate
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray) -> torch.Tensor:
    """A (H, W, 3) array as (3, H, W), interleaved in memory, without a copy."""
    return torch.from_numpy(array).permute(2, 0, 1)
