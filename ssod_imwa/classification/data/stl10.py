"""STL-10: 10 classes at 96 px, 500 training and 800 test images of each, 100,000 without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ssod_imwa.classification.data.augmentation import resized
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.errors import DataError

FOLDER = "stl10_binary"
# In the order of its class_names.txt; labels are written from 1.
CLASSES = (*("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),)
EDGE = 96
Part = Literal["train", "test", "unlabeled"]
IMAGES: dict[Part, int] = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
_CHUNK = 1_000  # images that are resized at once


def load_stl10(root: str | Path, part: Part, *, size: int = EDGE) -> ClassificationDataset:
    """A part of STL-10 from its binaries.

    Args:
        root: folder with `stl10_binary/{train,test}_{X,y}.bin` and `unlabeled_X.bin`.
        part: 5,000, 8,000 or 100,000 images; the last are of these classes and of others.
        size: edge of the images in memory: 96, or what they are resized to when they are read, as
            ACR does; uint8 (N, 3, size, size). 100,000 images take 2.8 GB, at 32 pixels 0.3.

    Raises:
        DataError: a file is missing or has another size, or a label is out of range.
    """
    folder = Path(root) / FOLDER
    name = f"stl10_{part}" if size == EDGE else f"stl10_{size}_{part}"
    count = IMAGES[part]
    pixels = _read(folder / f"{part}_X.bin", name, count * 3 * EDGE * EDGE)
    # Written column by column, as MATLAB does.
    stored = torch.from_numpy(pixels).view(count, 3, EDGE, EDGE).transpose(2, 3)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for first in range(0, count, _CHUNK):
        images[first : first + _CHUNK] = resized(stored[first : first + _CHUNK], size)
    if part == "unlabeled":
        unknown = torch.full((count,), -1)
        return ClassificationDataset(name, unknown, CLASSES, images=images, is_labeled=False)
    labels = torch.from_numpy(_read(folder / f"{part}_y.bin", name, count)).long() - 1
    return ClassificationDataset(name, labels, CLASSES, images=images)


def _read(file: Path, name: str, size: int) -> np.ndarray:
    """uint8 (size,), the bytes of a file, read as they are used."""
    try:
        present = file.stat().st_size
        if present != size:
            raise DataError(f"{name}: {file} has {present:,} bytes (must be {size:,})")
        return np.memmap(file, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        raise DataError(f"{name}: {file} does not exist (unpack stl10_binary.tar.gz)") from None
    except OSError as error:
        raise DataError(f"{name}: {file} cannot be read ({error.strerror})") from error
