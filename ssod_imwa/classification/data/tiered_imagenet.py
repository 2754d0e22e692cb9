"""Tiered-ImageNet as MFW's step data: few-shot learning's classes, of which one part is rare."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ssod_imwa.classification.data.datasets import (
    ClassificationDataset,
    dataset_of_files,
    load_image_folder,
    read_into_memory,
)
from ssod_imwa.classification.data.imbalance import positions_by_class
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

FOLDER = "tiered_imagenet"
# The frequent classes are those that few-shot learning trains on, the rare ones those it tests on
# (Ren et al., arXiv 1803.00676).
PARTS = {"train": 351, "test": 160}
TEST_IMAGES = 50
RARE_IMAGES = 5


def load_tiered_imagenet(
    root: str | Path, split: Literal["train", "test"]
) -> ClassificationDataset:
    """511 classes: 351 with all their images but 50, then 160 with 5; tested on 50 images of each.

    MFW does not say which images these are. Here those of a class are drawn from its files, sorted
    by name, by a generator of its name: the first 50 are for testing, the next ones for training.

    Args:
        root: folder with `tiered_imagenet/{train,test}/CLASS`, images of one size.
        split: uint8 (N, 3, H, W) in memory: about 431,000 images (9 GB at 84 pixels) or 25,550.

    Raises:
        DataError: files are missing, damaged or of several sizes, or the classes are others.

    Source: MFW, section 5.1.
    """
    name = f"tiered_imagenet_{split}"
    files: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    for part in PARTS:
        of_part = _load_part(Path(root) / FOLDER / part, name, part)
        groups = positions_by_class(of_part.labels, len(of_part.classes))
        for class_name, positions in zip(of_part.classes, groups, strict=True):
            of_class = [of_part.files[i] for i in positions.tolist()]
            chosen = _chosen(of_class, class_name, split, rare=part == "test", name=name)
            files += chosen
            labels += [len(classes)] * len(chosen)
            classes.append(class_name)
    return read_into_memory(dataset_of_files(name, files, labels, classes))


def _load_part(folder: Path, name: str, part: str) -> ClassificationDataset:
    dataset = load_image_folder(folder, name=name)
    if len(dataset.classes) != PARTS[part]:
        raise DataError(
            f"{name}: {folder} has {len(dataset.classes)} classes (must be the {PARTS[part]} of "
            "few-shot learning)"
        )
    return dataset


def _chosen(files: list[str], class_name: str, split: str, *, rare: bool, name: str) -> list[str]:
    """A class's files of one split."""
    if len(files) < TEST_IMAGES + RARE_IMAGES:
        raise DataError(
            f"{name}: class {class_name} has {len(files)} images (must be at least "
            f"{TEST_IMAGES + RARE_IMAGES})"
        )
    order = counted_generator(0, "tiered imagenet", class_name).permutation(len(files))
    first, last = (0, TEST_IMAGES) if split == "test" else (TEST_IMAGES, len(files))
    if rare and split == "train":
        last = TEST_IMAGES + RARE_IMAGES
    return [files[i] for i in sorted(order[first:last].tolist())]
