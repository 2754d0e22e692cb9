"""Small-ImageNet-127: down-sampled ImageNet in the 127 classes of one level of WordNet.

The 127 classes are the "top-down" level of Huh, Agrawal and Efros (arXiv 1608.08614), the images
those of Chrabaszcz et al. (arXiv 1707.08819). Which fine class belongs to which of the 127 is in
lists whose authors state no licence, so it is not shipped: `fine_to_coarse` makes it from the lists
that a user has, and `tools/prepare_imagenet127.py` writes it beside the images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.data.array_pickles import read_array_pickle
from ssod_imwa.data.text_files import read_text
from ssod_imwa.errors import DataError

MAP_FILE = "imagenet127/classes.txt"
FINE, COARSE = 1000, 127
BATCHES = {"train": [f"train_data_batch_{n}" for n in range(1, 11)], "val": ["val_data"]}
# Fine classes in the ten largest of the 127, and how many hold one alone.
LARGEST = (218, 124, 92, 59, 57, 47, 43, 25, 21, 17)
SINGLE = 65

_TRAINING_IMAGE = re.compile(r"(n\d{8})_")


def load_imagenet127(
    root: str | Path, part: Literal["train", "val"], *, size: Literal[32, 64]
) -> ClassificationDataset:
    """A part of Small-ImageNet-127, class 0 the one with most training images.

    Args:
        root: folder with `imagenet32/` or `imagenet64/`, the pickles of Chrabaszcz et al. as they
            are unpacked, and with `imagenet127/classes.txt`.
        part: 1,281,167 or 50,000 images, uint8 (N, 3, size, size) in memory, 3.9 GB at 32 pixels;
            both are imbalanced.
        size: edge of the images in pixels.

    Raises:
        DataError: a file is missing, no pickle of such images, or the table has another form.
    """
    name = f"imagenet127_{size}_{part}"
    table, names = read_class_table(Path(root) / MAP_FILE)
    folder = Path(root) / f"imagenet{size}"
    pixels, fine = zip(*(_read_batch(folder / x, name, size) for x in BATCHES[part]), strict=True)
    labels = torch.from_numpy(table[np.concatenate(fine) - 1])
    images = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, size, size)
    return ClassificationDataset(name, labels, names, images=images)


def read_fine_counts(root: str | Path, *, size: Literal[32, 64]) -> np.ndarray:
    """Training images of each of the 1000 fine classes, in the order of the pickles, int64 (1000,).

    Raises:
        DataError: a file is missing or no pickle of such images.
    """
    name, counts = f"imagenet{size}", np.zeros(FINE, dtype=np.int64)
    for file in BATCHES["train"]:
        _, labels = _read_batch(Path(root) / name / file, name, size)
        counts += np.bincount(labels - 1, minlength=FINE)
    return counts


def _read_batch(file: Path, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 3 size size) pixels and int64 (n,) fine labels from 1 of a pickle."""
    try:
        content = read_array_pickle(file)
    except FileNotFoundError:
        raise DataError(
            f"{name}: {file} does not exist (unpack the down-sampled ImageNet)"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{name}: {file} is not a pickle of images ({error})") from error
    keys = content.keys() if isinstance(content, dict) else ()
    pixels = content["data"] if "data" in keys else None
    if not isinstance(pixels, np.ndarray) or "labels" not in keys:
        raise DataError(f"{name}: {file} has no data and labels (must be a batch of images)")
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * size * size,):
        raise DataError(
            f"{name}: {file} has data of {pixels.dtype} {pixels.shape} (must be uint8, a row of "
            f"{3 * size * size} for each image)"
        )
    labels = np.asarray(content["labels"])
    in_range = labels.dtype.kind in "iu" and labels.shape == (len(pixels),) and len(labels)
    if not in_range or labels.min() < 1 or labels.max() > FINE:
        raise DataError(f"{name}: {file} has other labels than one of 1..{FINE} for each image")
    return pixels, labels.astype(np.int64)


def read_class_table(file: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each fine class, int64 (1000,) in the order of the pickles, and all names.

    Args:
        file: 1000 lines "CLASS NAME", as `class_table` makes them.

    Raises:
        DataError: the file is missing or has another form.
    """
    try:
        lines = read_text(file).splitlines()
    except FileNotFoundError:
        raise DataError(f"{file} does not exist (tools/prepare_imagenet127.py makes it)") from None
    names: dict[int, str] = {}
    table = np.zeros(len(lines), dtype=np.int64)
    for number, line in enumerate(lines, start=1):
        label, _, name = line.partition(" ")
        if not label.isdecimal() or names.setdefault(int(label), name) != name or not name:
            raise DataError(f"{file}:{number}: {line!r} is not allowed (write CLASS NAME)")
        table[number - 1] = int(label)
    if len(lines) != FINE or sorted(names) != list(range(COARSE)):
        raise DataError(
            f"{file}: has {len(lines)} lines of {len(names)} classes (must be {FINE} of classes "
            f"0..{COARSE - 1})"
        )
    return table, tuple(names[label] for label in range(COARSE))


def class_table(coarse: Mapping[int, str], fine_counts: np.ndarray) -> list[str]:
    """Lines "CLASS NAME" for each fine class, classes numbered by falling number of images.

    Args:
        coarse: names of the coarse classes, by fine class 0..999 in the order of the pickles.
        fine_counts: training images of each fine class.

    Example:
        >>> class_table({0: "dog", 1: "cup", 2: "dog"}, np.array([3, 4, 2]))
        ['0 dog', '1 cup', '0 dog']
    """
    images: Counter[str] = Counter()
    for fine, name in coarse.items():
        images[name] += int(fine_counts[fine])
    order = sorted(images, key=lambda name: (-images[name], name))
    return [f"{order.index(coarse[fine])} {coarse[fine]}" for fine in sorted(coarse)]


def fine_to_coarse(coarse_list: Path, fine_list: Path | None, synsets: Path) -> dict[int, str]:
    """The coarse class of each fine class, in the order of the pickles.

    Args:
        coarse_list: lines "IMAGE CLASS" of validation images, or of training images, whose names
            begin with their synset (as CoSSL's imgname2folder.txt).
        fine_list: lines "IMAGE LABEL" of the validation images in the 1000 classes, sorted by
            synset (Caffe's val.txt); None for training images.
        synsets: ILSVRC's map_clsloc.txt, lines "SYNSET NUMBER NAME", numbers from 1.

    Returns:
        Names by fine class 0..999.

    Raises:
        DataError: a list has another form, or they do not make 127 classes of 1000.
    """
    numbers = {}
    for line in _lines(synsets):
        synset, number, *_ = [*line.split(), "", ""]
        if not number.isdecimal():
            raise DataError(f"{synsets}: {line!r} is not allowed (write SYNSET NUMBER NAME)")
        numbers[synset] = int(number) - 1
    by_rank = [numbers[synset] for synset in sorted(numbers)]
    labels = {} if fine_list is None else dict(_pairs(fine_list))
    coarse: dict[int, str] = {}
    for image, name in _pairs(coarse_list):
        fine = _fine_of(image, labels, by_rank, numbers, coarse_list)
        if coarse.setdefault(fine, name) != name:
            raise DataError(
                f"{coarse_list}: fine class {fine} is of {coarse[fine]} and of {name} (must be of "
                "one)"
            )
    sizes = sorted(Counter(coarse.values()).values(), reverse=True)
    if (
        sorted(coarse) != list(range(FINE))
        or tuple(sizes[:10]) != LARGEST
        or (sizes.count(1) != SINGLE)
    ):
        raise DataError(
            f"{coarse_list} makes {len(sizes)} classes of {len(coarse)} fine ones, the largest of "
            f"{sizes[:3]} (must be {COARSE} of {FINE}, the largest of {list(LARGEST[:3])})"
        )
    return coarse


def _fine_of(
    image: str,
    labels: Mapping[str, str],
    by_rank: list[int],
    numbers: Mapping[str, int],
    source: Path,
) -> int:
    """The fine class of an image, by its label among sorted synsets or by its own synset."""
    label = labels.get(image, "")
    if label.isdecimal() and int(label) < len(by_rank):
        return by_rank[int(label)]
    match = _TRAINING_IMAGE.match(image)
    if match and match[1] in numbers:
        return numbers[match[1]]
    raise DataError(f"{source}: the fine class of {image} is not known (give the list of labels)")


def _pairs(file: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in _lines(file):
        name, _, value = line.strip().rpartition(" ")
        if not name:
            raise DataError(f"{file}: {line!r} is not allowed (write IMAGE CLASS)")
        pairs.append((name.strip(), value))
    return pairs


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in read_text(file).splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
