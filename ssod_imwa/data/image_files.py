"""Which files are images, and their size without decoding them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ssod_imwa.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# PIL raises SyntaxError for broken PNG chunks and ValueError for some truncated files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height (EXIF 2.3, table 4)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once its EXIF orientation is applied."""
    width, height = image.size
    if image.getexif().get(_EXIF_ORIENTATION, 1) in _SIDEWAYS:
        return height, width
    return width, height


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image file, read from its header alone.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except FileNotFoundError:
        raise DataError(f"image {path} does not exist") from None
    except DECODING_ERRORS as error:
        raise DataError(f"image {path} cannot be read: {error}") from error
