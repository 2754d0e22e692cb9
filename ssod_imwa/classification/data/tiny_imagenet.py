"""Tiny-ImageNet: 200 classes at 64 px, 500 training and 50 validation images of each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ssod_imwa.classification.data.datasets import (
    ClassificationDataset,
    dataset_of_files,
    load_image_folder,
    read_into_memory,
)
from ssod_imwa.data.image_files import is_hidden
from ssod_imwa.data.text_files import read_text
from ssod_imwa.errors import DataError

FOLDER = "tiny-imagenet-200"


def load_tiny_imagenet(root: str | Path, split: Literal["train", "val"]) -> ClassificationDataset:
    """Tiny-ImageNet as it is unpacked; its classes are in the order of their WordNet ids.

    The images of "val", which papers test on, lie in one folder; their classes are in
    `val/val_annotations.txt`.

    Args:
        root: folder with `tiny-imagenet-200/{train,val}`.
        split: uint8 (N, 3, 64, 64) in memory, 100,000 (1.2 GB) or 10,000 images.

    Raises:
        DataError: files are missing, damaged, or of another form.
    """
    folder = Path(root) / FOLDER
    name = f"tiny_imagenet_{split}"
    if split == "train":
        return read_into_memory(load_image_folder(folder / "train", name=name))
    if not (folder / "train").is_dir():
        raise DataError(f"{name}: image folder {folder / 'train'} does not exist")
    classes = sorted(
        entry.name
        for entry in (folder / "train").iterdir()
        if entry.is_dir() and not is_hidden(entry.name)
    )
    file = folder / "val" / "val_annotations.txt"
    try:
        lines = read_text(file).splitlines()
    except FileNotFoundError:
        raise DataError(f"{name}: {file} does not exist") from None
    numbers = {class_name: label for label, class_name in enumerate(classes)}
    files, labels = [], []
    for number, line in enumerate(lines, start=1):
        image, _, rest = line.partition("\t")
        label = numbers.get(rest.split("\t")[0])
        if label is None:
            raise DataError(f"{file}:{number}: {line!r} is not allowed (write IMAGE, tab, class)")
        files.append(str(folder / "val" / "images" / image))
        labels.append(label)
    return read_into_memory(dataset_of_files(name, files, labels, classes))
