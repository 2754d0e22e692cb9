"""Which files are images, whether they are whole, their size without decoding, their pixels."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Images of these formats are not read from folders, which is said.
OTHER_SUFFIXES = (
    *(".avif", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".pnm"),
    *(".ppm", ".tga"),
)

# No format that Pillow reads has longer edges, in pixels.
MAX_EDGE = 2**31

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

SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height (EXIF 2.3, table 4)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 0x0100, 0x0101


def image_paths(folder: str | Path) -> list[Path]:
    """The image files anywhere below a folder, in the order of their paths.

    What systems and editors leave behind is no image of the user's: files and folders whose names
    begin with a dot, and `__MACOSX`. How many of these look like images is logged. Links that lead
    nowhere are among the images: who reads them names them. Links to folders are followed, but for
    those that lead back to a folder above them, which are logged, as are images of other formats.

    Raises:
        DataError: a folder cannot be read.
    """
    folder = Path(folder)
    images, left_out, back, others = [], [], [], []
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        hidden = [name for name in folders if is_hidden(name)]
        visible = [name for name in folders if name not in hidden]
        folders[:] = [name for name in visible if not _leads_back(folder, Path(place, name))]
        back += [Path(place, name) for name in visible if name not in folders]
        named = [Path(place, name) for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        shown = [path for path in named if not is_hidden(path.name)]
        images += [path for path in shown if path.is_file() or path.is_symlink()]
        left_out += [path for path in named if is_hidden(path.name)]
        left_out += [Path(place, name) for name in hidden]
        others += [
            Path(place, x) for x in files if x.lower().endswith(OTHER_SUFFIXES) and not is_hidden(x)
        ]
    if left_out:
        logger.info(
            "%s: left out %d hidden files and folders, such as %s",
            folder,
            len(left_out),
            left_out[0],
        )
    _warn_of(folder, back, "links that lead back to a folder above them")
    _warn_of(folder, others, f"images that do not end in one of {', '.join(IMAGE_SUFFIXES)}")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def _warn_of(folder: Path, left_out: list[Path], what: str) -> None:
    if left_out:
        logger.warning("%s: left out %d %s, such as %s", folder, len(left_out), what, min(left_out))


def _refuse(error: OSError) -> None:
    """Stop a walk, which would go on without a word; folders that are not there have no images."""
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"folder {error.filename} cannot be read ({error.strerror})") from error


def _leads_back(top: Path, link: Path) -> bool:
    """Whether a folder is a link to one that the walk from `top` to it came through, or above."""
    if not link.is_symlink():
        return False
    target = Path(os.path.realpath(link))
    walked = [folder for folder in link.parents if folder == top or top in folder.parents]
    return any(Path(os.path.realpath(folder)).is_relative_to(target) for folder in walked)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name was left behind by a system or an editor."""
    return name.startswith(".") or name == "__MACOSX"


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once its EXIF orientation is applied."""
    if orientation(image) not in SIDEWAYS:
        return image.size
    width, height = image.size
    if image.format == "TIFF":  # Pillow 11 and newer turn the size before the pixels
        tags = image.tag_v2  # type: ignore[attr-defined]  # TiffImageFile's
        width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    return height, width


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 2..8 where it is turned or mirrored, 1 where not."""
    if image.format == "PNG" and not _png_may_be_turned(image):
        return 1
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _png_may_be_turned(image: Image.Image) -> bool:
    """Whether a PNG has a chunk that Pillow takes an orientation from.

    It may stand behind the pixels, so Pillow decodes the whole image to find it. Here the lengths
    of chunks lead from one to the next: 0.1 ms instead of 100.
    """
    file = getattr(image, "fp", None)
    if file is None:  # has been loaded: what Pillow needs is there
        return True
    place = file.tell()
    try:
        file.seek(len(_PNG_SIGNATURE))
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return True
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                if file.read(min(length, 32)).startswith((b"Raw profile", b"XML:com.adobe.xmp")):
                    return True
                length -= min(length, 32)
            file.seek(length + 4, os.SEEK_CUR)  # and its checksum
        return False
    finally:
        file.seek(place)


def image_size(path: str | Path, *, whole: bool = False) -> tuple[int, int]:
    """Width and height in pixels of an image file, read from its header alone.

    Args:
        path: of the file.
        whole: make sure that a JPEG or PNG was not cut off, and that `read_image` takes its pixels.
            Only a file that does not end as its format demands (bytes may follow the image) is
            decoded, so it takes 0.1 ms an image.

    Raises:
        DataError: the file is missing, no image or, for `whole`, cut off or has 32-bit pixels.
    """
    try:
        with Image.open(path) as image:
            size = upright_size(image)
            if whole:
                check_pixels(image)
            ending = _ENDINGS.get(image.format or "") if whole else None
            if ending is not None and not _ends_with(path, ending):
                image.load()
            return size
    except FileNotFoundError:
        raise DataError(_absence(path)) from None
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path} cannot be read: {reason}") from error


def _absence(path: str | Path) -> str:
    """What to say of an image that is not there."""
    if os.path.islink(path):
        return f"image {path} is a link to {os.readlink(path)}, which does not exist"
    return f"image {path} does not exist"


def check_readable(
    name: str,
    images: Iterable[tuple[str, tuple[int, int] | None]],
    *,
    checker: str,
) -> None:
    """Make sure that a data set's images can be read, at 0.1 ms each.

    Found are files that are no image, are cut off (JPEG and PNG) or have another size than they
    should; not all other damage, for which every image has to be decoded.

    Args:
        name: of the data set.
        images: file and annotated width and height of each; None if it may have any.
        checker: the command that lists all with `--all`.

    Raises:
        DataError: an image cannot be read; it names the first one and how many there are.
    """
    faults = []
    for file, annotated in images:
        try:
            size = image_size(file, whole=True)
            if annotated is not None:
                check_size(file, size, annotated)
        except DataError as error:
            faults.append(str(error))
    if faults:
        more = f"; so {len(faults) - 1} more" if len(faults) > 1 else ""
        raise DataError(
            f"data set {name} cannot be read: {faults[0]}{more} (restore the image; {checker} "
            "--all lists all)"
        )


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
    dropped, and of 16-bit channels the high byte is kept. Pixels of 32 bits, whole numbers or not,
    have no defined range.

    Args:
        path: any format that Pillow reads.

    Returns:
        uint8 (3, H, W), RGB, interleaved in memory.

    Raises:
        DataError: the file is missing, damaged or has 32-bit pixels.
    """
    try:
        with Image.open(path) as image:
            check_pixels(image)
            if image.format == "TIFF":
                image.filename = ""  # else Pillow 11 and newer map it, and shear a turned one
            ImageOps.exif_transpose(image, in_place=True)
            array = np.array(_to_rgb(image))
    except FileNotFoundError:
        raise DataError(_absence(path)) from None
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"image {path} cannot be read: {reason}") from error
    return from_array(array)


def check_pixels(image: Image.Image) -> None:
    """Refuse an opened image whose pixels have 32 bits.

    Raises:
        ValueError: they have; which value is white is not known.
    """
    # Pillow before 11 has PNG's 16 bits in its mode of 32.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} pixels have no defined range (save it with 8 or 16 bits)")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale; Pillow's own conversion would saturate
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray) -> torch.Tensor:
    """A (H, W, 3) array as (3, H, W), interleaved in memory, without a copy."""
    return torch.from_numpy(array).permute(2, 0, 1)
