"""Lists of labeled images: ImageNet-LT's text files, iNaturalist's and BBN's JSON files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset, dataset_of_files
from ssod_imwa.data.text_files import is_text, read_json, read_text
from ssod_imwa.errors import DataError

# Images and classes of the published lists, by file name (Kang et al., arXiv 1910.09217). Places-LT
# was issued twice; only the list of 62,500 images is the one papers report on.
PUBLISHED_LISTS = {
    "ImageNet_LT_train": (115_846, 1000),
    "ImageNet_LT_val": (20_000, 1000),
    "ImageNet_LT_test": (50_000, 1000),
    "Places_LT_train": (62_500, 365),
    "Places_LT_val": (7_300, 365),
    "Places_LT_test": (36_500, 365),
    "iNaturalist18_train": (437_513, 8142),
    "iNaturalist18_val": (24_426, 8142),
}


_LINE = re.compile(r"(?P<path>.*\S)\s+(?P<label>[0-9]{1,18})")


def load_list_file(
    list_file: str | Path,
    image_folder: str | Path,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    complete: bool = True,
) -> ClassificationDataset:
    """The images of a list, as files.

    A text file has lines "PATH LABEL", as of ImageNet-LT, Places-LT, iNaturalist 2018. A file that
    ends in .json is iNaturalist's own, whose "annotations" name one of "images" by its id, or BBN's
    and NCL's, whose "annotations" have an "fpath". A list named like one of `PUBLISHED_LISTS` needs
    its number of images and classes. Whether the images exist is not looked up: on network disks
    that takes longer than an epoch.

    Args:
        list_file: labels are 0..C-1; paths may contain spaces.
        image_folder: what the paths are relative to.
        name: of the data set.
        classes: names in label order; None numbers them "0".."C-1", up to the largest label.
        complete: whether every class needs an image, as for training.

    Raises:
        DataError: file or folder is missing, an entry has another form, or a class has no images.
    """
    files, labels = _read(Path(list_file), Path(image_folder), name)
    if classes is None:
        if max(labels) >= len(labels):
            raise DataError(
                f"{list_file}: label {max(labels)} is not allowed with {len(labels)} images "
                "(labels are 0..C-1, and each class needs an image)"
            )
        classes = [str(label) for label in range(max(labels) + 1)]
    dataset = dataset_of_files(name, files, labels, classes, complete=complete)
    return replace(dataset, list_file=str(list_file))


def load_plain_list(
    list_file: str | Path, image_folder: str | Path, *, name: str, classes: Sequence[str]
) -> ClassificationDataset:
    """The images of a list, as files, unlabeled; classes may have none.

    The labels are kept for records where classes are named by them, "0".."C-1", and none is beyond
    C - 1; else they are -1.

    Args:
        list_file: see `load_list_file`, as is the next.
        image_folder: what the paths are relative to.
        name: of the data set.
        classes: of the labeled images, in label order.

    Raises:
        DataError: file or folder is missing, or an entry has another form.
    """
    files, labels = _read(Path(list_file), Path(image_folder), name)
    numbered = tuple(classes) == tuple(map(str, range(len(classes))))
    known = numbered and max(labels) < len(classes)
    truth = torch.tensor(labels) if known else torch.full((len(labels),), -1)
    return ClassificationDataset(
        name, truth, tuple(classes), files=files, list_file=str(list_file), is_labeled=False
    )


def _read(list_file: Path, image_folder: Path, name: str) -> tuple[tuple[str, ...], list[int]]:
    """Files and labels of a list that is not empty, nor another one than was published."""
    if not os.path.isdir(image_folder):
        raise DataError(f"{name}: image folder {image_folder} does not exist")
    read = _read_json if list_file.suffix == ".json" else _read_text
    try:
        entries = read(list_file)
    except FileNotFoundError:
        raise DataError(f"{name}: list of images {list_file} does not exist") from None
    if not entries:
        raise DataError(f"{name}: list of images {list_file} is empty")
    labels = [label for _, label in entries]
    _check_published(list_file, len(labels), max(labels) + 1)
    return tuple(str(image_folder / path) for path, _ in entries), labels


def _read_text(file: Path) -> list[tuple[str, int]]:
    entries = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        entry = _LINE.fullmatch(line.strip())
        if entry is None:
            raise DataError(f'{file}:{number}: {line!r} is not allowed (write "PATH LABEL")')
        entries.append((entry["path"], int(entry["label"])))
    return entries


def _read_json(file: Path) -> list[tuple[str, int]]:
    content = read_json(file)
    try:
        paths: dict[Any, str] = {}
        for image in content.get("images", []):
            if image["id"] in paths:
                raise ValueError(f"two images have the id {image['id']!r}")
            paths[image["id"]] = image["file_name"]
        return [_entry(item, paths) for item in content["annotations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f'{file}: {reason} (must have "annotations" with a "category_id" and either an "fpath" '
            'or the "image_id" of one of "images")'
        ) from error


def _entry(item: dict[str, Any], paths: dict[Any, str]) -> tuple[str, int]:
    label = item["category_id"]
    if type(label) is not int or not 0 <= label < 10**18:
        raise ValueError(f"category_id = {label!r} is not allowed (must be 0..C-1)")
    path = item["fpath"] if "fpath" in item else paths[item["image_id"]]
    if not is_text(path):
        raise ValueError(f"path {path!r} is not allowed (must name a file)")
    return path, label


def _check_published(list_file: Path, images: int, classes: int) -> None:
    expected = PUBLISHED_LISTS.get(list_file.stem)
    if expected not in (None, (images, classes)):
        raise DataError(
            f"{list_file} has {images} images of {classes} classes, the published list has "
            f"{expected[0]} of {expected[1]} (get it again, or rename a list of your own)"
        )
