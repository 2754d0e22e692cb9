"""What can be wrong in a classification data set beyond what its reader refuses."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.data import image_files
from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.problems import Problem
from ssod_imwa.errors import DataError


def check_readable(dataset: ClassificationDataset) -> None:
    """Make sure that images in files can be read, at 0.1 ms each; those in memory have been.

    Raises:
        DataError: see `image_files.check_readable`.
    """
    checker = f"tools/check_dataset.py {dataset.name} --classification"
    image_files.check_readable(
        dataset.name, ((file, None) for file in dataset.files), checker=checker
    )


def find_image_problems(dataset: ClassificationDataset, *, read_pixels: bool) -> list[Problem]:
    """Images that are missing or cannot be decoded, and files that are listed twice.

    Args:
        dataset: images in memory have been decoded, so nothing is found in them.
        read_pixels: open and decode every image; without it only missing files are found.
    """
    problems = []
    for position, file in enumerate(dataset.files):
        fault = _damage(file, read_pixels=read_pixels)
        if fault is not None:
            rule = "restore the file, or take the image out of the data set"
            place = f"image {position}"
            problems.append(Problem(file, place, *fault, rule, position=position))
    return [*problems, *_listed_twice(dataset)]


def _listed_twice(dataset: ClassificationDataset) -> Iterator[Problem]:
    """Files that count twice, which may be meant; under two classes it is not."""
    places = defaultdict(list)
    for position, file in enumerate(dataset.files):
        places[file].append(position)
    for file, positions in places.items():
        if len(positions) == 1:
            continue
        entries = f"entries {', '.join(str(position + 1) for position in positions)}"
        # Of unlabeled images only the file counts.
        labels = sorted({_label(dataset, i) for i in positions} if dataset.is_labeled else {""})
        to_edit = dataset.list_file or file
        value = f"{file} as {' and '.join(labels)}" if dataset.is_labeled else file
        if len(labels) == 1:
            what, rule, level = "duplicate file", "counts as often as it is listed", "note"
        else:
            what, rule, level = "file of several classes", "must be of one class", "warning"
        yield Problem(to_edit, entries, what, value, rule, level=level)


def _label(dataset: ClassificationDataset, position: int) -> str:
    return dataset.classes[int(dataset.labels[position])]


def _damage(file: str, *, read_pixels: bool) -> tuple[str, str] | None:
    """What is wrong with a file, and the value."""
    if not os.path.isfile(file):
        return "missing image", "there is no such file"
    if read_pixels:
        try:
            read_image(file)
        except DataError as error:
            return "unreadable image", str(error)
    return None
