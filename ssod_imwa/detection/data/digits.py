"""Digit scenes: a small detection data set that is made on the spot.

Real handwritten digits (scikit-learn's copy of the UCI optical digits, 1,797 images of 8 x 8) on
darker, textured backgrounds of 128 x 128, 2 to 5 to a scene and 20 to 44 pixels large. The
handwriting is divided into train and test before any scene is made. Training boxes are long-tailed
over the classes, test boxes are balanced. Scenes are drawn in integer arithmetic from raw bits of a
counted generator, so a seed gives the same pixels with every version of NumPy and Pillow.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod_imwa.data.handwriting import CLASSES, is_for_testing
from ssod_imwa.data.profiles import exponential_profile
from ssod_imwa.data.text_files import read_json
from ssod_imwa.engine.checkpoint.atomic import make_room
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError, OutputError, writing

logger = logging.getLogger(__name__)

VERSION = 1  # of the drawing rules; scenes of another version are not the same data set
SIZE = 128
TRAIN_SCENES = 1000
TEST_SCENES = 400
IMBALANCE = 20

_OBJECTS = (2, 5)
_EXTENT = (24, 44)  # longer side of a digit in pixels, before it is cut to its visible part
_MAX_OVERLAP = 0.05  # intersection over union of two boxes
_CONTRAST = 112  # smallest difference of a digit's luminance to the background under it, of 255


class Bits:
    """Random integers from the raw bits of a counted generator."""

    def __init__(self, *counts: int | str) -> None:
        self._raw = counted_generator(*counts).bit_generator.random_raw

    def integer(self, low: int, high: int) -> int:
        """One of low..high."""
        return low + (int(self._raw()) * (high - low + 1) >> 64)

    def bytes(self, *shape: int) -> np.ndarray:
        """int64 array of the given shape, values 0..255."""
        return (self._raw(int(np.prod(shape))) >> np.uint64(56)).astype(np.int64).reshape(shape)

    def shuffled(self, count: int) -> list[int]:
        """A permutation of 0..count-1."""
        return np.argsort(self._raw(count), kind="stable").tolist()


def class_counts(boxes: int, *, classes: int = 10, imbalance: int = 1) -> list[int]:
    """Boxes of each class, falling exponentially from the first class to the last.

    Class c gets a share proportional to imbalance^(-c / (classes - 1)), the profile of long-tailed
    CIFAR (Cui et al., arXiv 1901.05555); rounding keeps the sum and at least 1 a class.

    Raises:
        ValueError: fewer boxes than classes.

    Example:
        >>> class_counts(100, classes=3, imbalance=4)
        [57, 29, 14]
    """
    if boxes < classes:
        raise ValueError(f"boxes = {boxes} is not allowed (must be at least {classes}, 1 a class)")
    shares = exponential_profile(classes, imbalance)
    exact = [max(1.0, boxes * share / sum(shares)) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(classes), key=lambda c: counts[c] - exact[c])
    for c in by_remainder[: boxes - sum(counts)]:
        counts[c] += 1
    while sum(counts) > boxes:  # the minimum of 1 may have added too much
        counts[counts.index(max(counts))] -= 1
    return counts


def make_digits(
    folder: str | Path,
    *,
    seed: int = 1,
    train_scenes: int = TRAIN_SCENES,
    test_scenes: int = TEST_SCENES,
    imbalance: int = IMBALANCE,
) -> None:
    """Write the digit scenes: `annotations/{train,test}.json`, `train/*.png`, `test/*.png`.

    The folder appears complete or not at all.

    Args:
        folder: must not exist.
        seed: everything drawn is a function of it.
        train_scenes: number of training images, at least 10.
        test_scenes: number of test images, at least 10.
        imbalance: boxes of the most frequent training class over those of the rarest.

    Raises:
        DataError: the folder exists, or a number is out of range.
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    for what, value in (("train_scenes", train_scenes), ("test_scenes", test_scenes)):
        if value < 10:
            raise DataError(f"{what} = {value} is not allowed (must be at least 10)")
    if imbalance < 1:
        raise DataError(f"imbalance = {imbalance} is not allowed (must be at least 1)")
    if folder.exists():
        raise DataError(f"{folder} exists already (delete it to make the digit scenes again)")
    handwriting = _handwriting()
    make_room(folder)
    with writing(folder):
        scratch = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
    try:
        with writing(folder):
            _write_split(scratch, "train", handwriting["train"], seed, train_scenes, imbalance)
            _write_split(scratch, "test", handwriting["test"], seed, test_scenes, 1)
            scratch.chmod(0o755)  # mkdtemp's folders are private
            os.rename(scratch, folder)
    except OutputError:
        # Another process may have been faster; its scenes are the same.
        if not (folder / "annotations" / "test.json").exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ensure_digits(root: str | Path) -> Path:
    """Make the digit scenes below a root folder unless they are there; returns their folder.

    Raises:
        DataError: they are those of another version.
        OutputError: they cannot be written.
    """
    folder = Path(root) / "digits"
    if not folder.exists():
        logger.info("making the digit scenes in %s (a few seconds, once)", folder)
        make_digits(folder)
    try:
        version = read_json(folder / "annotations" / "test.json")["info"]["version"]
    except (DataError, OSError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} holds no digit scenes ({error!r}); delete it and they are made again"
        ) from error
    if version != VERSION:
        raise DataError(
            f"{folder} holds digit scenes of version {version}, this is version {VERSION} "
            "(delete the folder and they are made again)"
        )
    return folder


def _handwriting() -> dict[str, list[list[np.ndarray]]]:
    """For "train" and "test": for each class, glyphs of 0..16 cut to their ink."""
    # Imported here: scikit-learn takes a second to import and is needed once.
    from sklearn.datasets import load_digits

    digits = load_digits()
    glyphs: dict[str, list[list[np.ndarray]]] = {
        split: [[] for _ in CLASSES] for split in ("train", "test")
    }
    images, for_testing = digits.images.astype(np.int64), is_for_testing(digits.target)
    for image, label, test in zip(images, digits.target, for_testing, strict=True):
        rows, columns = np.nonzero(image.any(1))[0], np.nonzero(image.any(0))[0]
        glyph = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        glyphs["test" if test else "train"][label].append(glyph)
    return glyphs


def _write_split(
    folder: Path,
    split: str,
    glyphs: Sequence[Sequence[np.ndarray]],
    seed: int,
    scenes: int,
    imbalance: int,
) -> None:
    (folder / split).mkdir()
    (folder / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, labels in enumerate(_deal_labels(split, seed, scenes, imbalance), start=1):
        bits = Bits("digits", VERSION, seed, split, number)
        pixels, boxes = _draw_scene(bits, labels, glyphs)
        file_name = f"{number:06d}.png"
        Image.fromarray(pixels).save(folder / split / file_name, compress_level=1)
        images.append({"id": number, "file_name": file_name, "width": SIZE, "height": SIZE})
        for label, (x, y, width, height) in zip(labels, boxes, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1}
            shape = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
            annotations.append({**entry, **shape})
    content = {
        "info": {"description": f"digit scenes, {split}", "version": VERSION, "seed": seed},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c + 1, "name": name} for c, name in enumerate(CLASSES)],
    }
    text = json.dumps(content)
    (folder / "annotations" / f"{split}.json").write_text(text, encoding="utf-8")


def _deal_labels(split: str, seed: int, scenes: int, imbalance: int) -> list[list[int]]:
    """Labels of each scene, dealt from a shuffled pack with exactly the wanted counts."""
    bits = Bits("digits", VERSION, seed, split, "labels")
    sizes = [bits.integer(*_OBJECTS) for _ in range(scenes)]
    counts = class_counts(sum(sizes), classes=len(CLASSES), imbalance=imbalance)
    pack = [label for label, count in enumerate(counts) for _ in range(count)]
    order = iter(bits.shuffled(len(pack)))
    return [[pack[next(order)] for _ in range(size)] for size in sizes]


def _draw_scene(
    bits: Bits, labels: Sequence[int], glyphs: Sequence[Sequence[np.ndarray]]
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """uint8 (SIZE, SIZE, 3) and each digit's x, y, width, height."""
    scene = _background(bits)
    inks = [_ink(bits, glyphs[label][bits.integer(0, len(glyphs[label]) - 1)]) for label in labels]
    boxes = _place(bits, [ink.shape for ink in inks])
    for ink, (x, y, width, height) in zip(inks, boxes, strict=True):
        under = scene[y : y + height, x : x + width]
        under[...] = _painted(bits, under, ink)
    noise = bits.bytes(SIZE, SIZE, 3) * bits.integer(4, 16) // 255
    return np.clip(scene + noise - noise.max() // 2, 0, 255).astype(np.uint8), boxes


def _place(bits: Bits, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """A box x, y, width, height for each (height, width), hardly overlapping."""
    boxes: list[tuple[int, int, int, int]] = []
    tries = 0
    while len(boxes) < len(shapes):
        height, width = shapes[len(boxes)]
        box = bits.integer(0, SIZE - width), bits.integer(0, SIZE - height), width, height
        if all(_overlap(box, other) <= _MAX_OVERLAP for other in boxes):
            boxes.append(box)
        tries += 1
        if tries % 100 == 0:  # the first boxes have left no room for the others
            boxes.clear()
    return boxes


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def _ink(bits: Bits, glyph: np.ndarray) -> np.ndarray:
    """A glyph enlarged, slanted and cut to what is visible: int64 coverage 0..256."""
    rows, columns = glyph.shape
    stretch = bits.integer(92, 112)  # width in percent
    longer = max(100 * rows, stretch * columns)
    extent = bits.integer(*_EXTENT)
    height = max(8, 100 * rows * extent // longer)
    width = max(6, stretch * columns * extent // longer)
    slant = bits.integer(-width // 12, width // 12)  # of the top against the bottom, in pixels
    width += abs(slant)
    y = (np.arange(height) * 2 + 1) * rows * _UNIT // (2 * height) - _UNIT // 2
    shift = slant * (2 * np.arange(height) - height + 1) // (2 * height)
    x = np.arange(width) * 2 + 1 - abs(slant) + 2 * shift[:, None]
    x = x * columns * _UNIT // (2 * (width - abs(slant))) - _UNIT // 2
    tall = _spline(glyph.T, np.broadcast_to(y, (columns, height))).T
    smooth = _spline(tall, x)
    # The spline lowers thin strokes; these values (of 16) become no ink and full ink.
    low, high = 2 * _SPLINE_SUM**2, 11 * _SPLINE_SUM**2
    ink = np.clip((smooth - low) * 256 // (high - low), 0, 256)
    visible_rows, visible_columns = (np.nonzero((ink > 96).any(axis))[0] for axis in (1, 0))
    return ink[visible_rows[0] : visible_rows[-1] + 1, visible_columns[0] : visible_columns[-1] + 1]


_UNIT = 64  # positions between two pixels
_SPLINE_SUM = 6 * _UNIT**3


def _spline(lines: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Cubic B-spline through each line at its positions (in 1/_UNIT pixels), times _SPLINE_SUM.

    Pixels beyond the ends are 0. Line i is sampled at positions[i].
    """
    pixel, f = positions // _UNIT, positions % _UNIT
    g = _UNIT - f
    weights = (
        g**3,
        4 * _UNIT**3 - 6 * f**2 * _UNIT + 3 * f**3,
        4 * _UNIT**3 - 6 * g**2 * _UNIT + 3 * g**3,
        f**3,
    )
    margin = 4 + max(0, -int(pixel.min()), int(pixel.max()) - lines.shape[1])
    padded = np.pad(lines, ((0, 0), (margin, margin)))
    return sum(
        weight * np.take_along_axis(padded, pixel + (margin - 1 + offset), axis=1)
        for offset, weight in enumerate(weights)
    )


def _painted(bits: Bits, under: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The digit in a light color that stands out from what is under it."""
    level = min(255, int(_luminance(under).mean()) + bits.integer(_CONTRAST, 190))
    tint = bits.bytes(3) * bits.integer(0, 64) // 255
    color = np.clip(level + tint - _luminance(tint), 0, 255)
    alpha = ink[..., None] * bits.integer(224, 256) // 256
    return under + (color - under) * alpha // 256


def _luminance(color: np.ndarray) -> np.ndarray:
    # ITU-R BT.601
    return (299 * color[..., 0] + 587 * color[..., 1] + 114 * color[..., 2]) // 1000


def _background(bits: Bits) -> np.ndarray:
    """int64 (SIZE, SIZE, 3), 0..255: one of five textures between two colors."""
    kinds = (_clouds, _grain, _stripes, _checks, _patches)
    texture = kinds[bits.integer(0, len(kinds) - 1)](bits)
    first = bits.integer(24, 128) + (bits.bytes(3) - 128) // 5
    second = np.clip(first + bits.integer(-40, 40) + (bits.bytes(3) - 128) // 8, 0, 255)
    light = _value_noise(bits, 96) - 128  # uneven lighting over the whole scene
    colors = first + (second - first) * texture[..., None] // 255
    return np.clip(colors + light[..., None] * bits.integer(0, 40) // 255, 0, 255)


def _value_noise(bits: Bits, period: int) -> np.ndarray:
    """Smooth noise 0..255: random values every `period` pixels, bilinear between them."""
    cells = (SIZE + period - 2) // period + 2
    grid = bits.bytes(cells, cells)
    cell, f = np.divmod(np.arange(SIZE) + bits.integer(0, period - 1), period)
    rows = (grid[cell] * (period - f)[:, None] + grid[cell + 1] * f[:, None]) // period
    return (rows[:, cell] * (period - f) + rows[:, cell + 1] * f) // period


def _clouds(bits: Bits) -> np.ndarray:
    octaves = [_value_noise(bits, period) * part for period, part in ((40, 4), (16, 2), (6, 1))]
    return np.sum(octaves, axis=0) // 7


def _grain(bits: Bits) -> np.ndarray:
    return (_value_noise(bits, 3) * 2 + _value_noise(bits, 32)) // 3


def _stripes(bits: Bits) -> np.ndarray:
    """Bent stripes of any direction."""
    y, x = np.mgrid[:SIZE, :SIZE]
    a, b = bits.integer(-8, 8), bits.integer(1, 8)
    period = bits.integer(10, 32) * max(abs(a), b)
    phase = (a * x + b * y + _value_noise(bits, 48) * period // 128) % period
    return np.abs(2 * phase - period) * 255 // period


def _checks(bits: Bits) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    side, bend = bits.integer(8, 24), _value_noise(bits, 64) // 16
    return ((x + bend) // side + (y + bend) // side) % 2 * 255


def _patches(bits: Bits) -> np.ndarray:
    """Two colors in irregular regions with soft borders."""
    return np.clip((_value_noise(bits, bits.integer(12, 28)) - 112) * 8, 0, 255)
