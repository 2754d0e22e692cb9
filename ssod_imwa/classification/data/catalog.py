"""From the name of a classification data set to its images."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ssod_imwa.classification.data.datasets import (
    ClassificationDataset,
    load_cifar,
    load_cifar10_lt100,
    load_digit_images,
    load_image_folder,
    load_plain_folder,
    read_into_memory,
)
from ssod_imwa.classification.data.feature_sets import read_features
from ssod_imwa.classification.data.imagenet127 import load_imagenet127
from ssod_imwa.classification.data.lists import load_list_file, load_plain_list
from ssod_imwa.classification.data.stl10 import IMAGES as STL10_IMAGES
from ssod_imwa.classification.data.stl10 import load_stl10
from ssod_imwa.classification.data.tiered_imagenet import load_tiered_imagenet
from ssod_imwa.classification.data.tiny_imagenet import load_tiny_imagenet
from ssod_imwa.data.roots import data_root
from ssod_imwa.data.text_files import name_bytes
from ssod_imwa.errors import DataError

Loader = Callable[[Path], ClassificationDataset]

_SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
_PARTS: tuple[Literal["train", "val"], ...] = ("train", "val")

# Folder of the images and list file below the root, by name, in the layout of the public codes.
_LISTS = {
    **{
        f"imagenet_lt_{part}": ("imagenet", f"imagenet/ImageNet_LT_{part}.txt")
        for part in ("train", "val", "test")
    },
    **{
        f"places_lt_{part}": ("places365", f"places365/Places_LT_{part}.txt")
        for part in ("train", "val", "test")
    },
    **{
        f"inaturalist18_{part}": ("inaturalist18", f"inaturalist18/iNaturalist18_{part}.txt")
        for part in ("train", "val")
    },
}


def _loaders() -> dict[str, Loader]:
    loaders: dict[str, Loader] = {
        f"tiny_imagenet_{part}": partial(load_tiny_imagenet, split=part) for part in _PARTS
    }
    for split in _SPLITS:
        loaders[f"digit_images_{split}"] = partial(_load_digits, split=split)
        loaders[f"cifar10_{split}"] = partial(load_cifar, split=split, classes=10)
        loaders[f"cifar100_{split}"] = partial(load_cifar, split=split, classes=100)
        loaders[f"cifar10_lt100_{split}"] = partial(load_cifar10_lt100, split=split)
        loaders[f"tiered_imagenet_{split}"] = partial(load_tiered_imagenet, split=split)
    for size in (32, 64):
        for part in _PARTS:
            loaders[f"imagenet127_{size}_{part}"] = partial(load_imagenet127, part=part, size=size)
    for entry in STL10_IMAGES:
        loaders[f"stl10_{entry}"] = partial(load_stl10, part=entry)
        loaders[f"stl10_32_{entry}"] = partial(load_stl10, part=entry, size=32)
    for name, (folder, file) in _LISTS.items():
        loaders[name] = partial(_load_list, name=name, folder=folder, file=file)
    return loaders


def _load_digits(root: Path, *, split: Literal["train", "test"]) -> ClassificationDataset:
    return load_digit_images(split)


def _load_list(root: Path, *, name: str, folder: str, file: str) -> ClassificationDataset:
    return load_list_file(root / file, root / folder, name=name)


_LOADERS = _loaders()


def available_images() -> list[str]:
    """Every name that `load_images` knows, sorted."""
    return sorted(_LOADERS)


def is_in_files(name: str) -> bool:
    """Whether a name alone, of a set of this package, says that its images stay in files.

    Example:
        >>> is_in_files("folder:photos"), is_in_files("places_lt_train"), is_in_files("stl10_train")
        (True, True, False)
    """
    return name in _LISTS or name.startswith(("folder:", "list:"))


def register_images(name: str, loader: Loader) -> None:
    """Give a classification data set a name, usable in DATASETS.TRAIN and TEST.

    Args:
        name: must not be taken, nor contain a colon.
        loader: gets the root folder and returns the data set.

    Raises:
        ValueError: the name is taken or has a colon.

    Example:
        >>> register_images("my_digits", lambda root: load_digit_images("train"))
    """
    if name in _LOADERS or ":" in name:
        raise ValueError(f"data set name {name!r} is not allowed (taken, or has a colon)")
    _LOADERS[name] = loader


def load_images(
    name: str,
    *,
    root: str | Path | None = None,
    classes: Sequence[str] | None = None,
    in_memory: bool = False,
    on_bad_record: str = "error",
) -> ClassificationDataset:
    """A classification data set by its name or by its place.

    Args:
        name: one of `available_images()`, or "folder:FOLDER" (a folder of images for each class),
            "list:FILE.txt:IMAGES" (lines "PATH LABEL") or "features:FILE" (cached features; with
            ":fit" or ":held_out" a part of them), relative to the root.
        root: folder of all data sets; None or "" takes $DETECTRON2_DATASETS, else "datasets".
        classes: names in label order that a "folder:" or "list:" has to have, those of the
            training set.
        in_memory: read images that are in files into memory; they must have one size.
        on_bad_record: see `read_into_memory`; images that stay in files are not read here.

    Raises:
        DataError: the name is unknown, files are missing, or images are broken.
    """
    folder = data_root(root)
    kind, _, place = name.partition(":")
    # A class may be missing where another set says which there are.
    settings: dict[str, Any] = {"name": name, "classes": classes, "complete": classes is None}
    if kind == "folder" and place:
        dataset = load_image_folder(folder / place, **settings)
    elif kind == "list" and ":" in place:
        file, _, images = place.partition(":")
        dataset = load_list_file(folder / file, folder / images, **settings)
    elif kind == "features" and place:
        file, _, part = place.partition(":")
        return read_features(folder / file, name=name, part=part)
    elif name in _LOADERS:
        dataset = _LOADERS[name](folder)
    else:
        near = difflib.get_close_matches(name, _LOADERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(
            f"data set {name!r} is not known for classification (must be one of "
            f"{', '.join(available_images())}, folder:FOLDER, list:FILE.txt:IMAGES or "
            f"features:FILE){hint}"
        )
    return read_into_memory(dataset, on_bad_record=on_bad_record) if in_memory else dataset


def load_unlabeled(
    name: str,
    *,
    root: str | Path | None = None,
    classes: Sequence[str],
    in_memory: bool = False,
    on_bad_record: str = "error",
) -> ClassificationDataset:
    """A data set of which only the images are trained on.

    What is known of their labels is kept for records: all of them where the set has the classes
    asked for, and of a "folder:FOLDER", whose images may lie in any subfolders or in none, those
    whose first subfolder is named like a class. A "list:" need not have images of every class.

    Args:
        name: see `load_images`.
        root: folder of all data sets.
        classes: of the labeled images, in label order.
        in_memory: see `load_images`.
        on_bad_record: see `load_images`.

    Raises:
        DataError: the name is unknown, or files are missing or broken.
    """
    folder = data_root(root)
    kind, _, place = name.partition(":")
    if kind == "folder" and place:
        dataset = load_plain_folder(folder / place, name=name, classes=classes)
        return read_into_memory(dataset, on_bad_record=on_bad_record) if in_memory else dataset
    if kind == "list" and ":" in place:
        file, _, images = place.partition(":")
        dataset = load_plain_list(folder / file, folder / images, name=name, classes=classes)
        return read_into_memory(dataset, on_bad_record=on_bad_record) if in_memory else dataset
    dataset = load_images(name, root=root, in_memory=in_memory, on_bad_record=on_bad_record)
    if dataset.classes == tuple(classes):
        return replace(dataset, is_labeled=False)
    unknown = torch.full_like(dataset.labels, -1)
    return replace(dataset, labels=unknown, classes=tuple(classes), is_labeled=False)


def image_fingerprint(dataset: ClassificationDataset) -> str:
    """Number of images and a digest of labels, names of files and pixels in memory, in order.

    Example:
        >>> image_fingerprint(load_digit_images("test"))[:4]
        '364:'
    """
    digest = hashlib.sha256(dataset.labels.numpy().tobytes())
    if dataset.images is not None:
        digest.update(dataset.images.contiguous().numpy().data)  # no copy: it may be gigabytes
    for file in dataset.files:  # without the root, which may move
        digest.update(name_bytes("/".join(Path(file).parts[-2:])))
    return f"{len(dataset)}:{digest.hexdigest()}"
