"""What can be wrong in a classification data set beyond what its reader refuses."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

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
    places = defaultdict(list)
    for position, file in enumerate(dataset.files):
        places[file].append(position)
        reason = _damage(file, read_pixels=read_pixels)
        if reason:
            rule = "must be an image that Pillow reads"
            problems.append(
                Problem(file, f"image {position}", "image", reason, rule, position=position)
            )
    for file, positions in places.items():
        labels = sorted({dataset.classes[int(dataset.labels[i])] for i in positions})
        if len(positions) > 1:
            problems.append(
                Problem(
                    file,
                    f"image {positions[0]}",
                    "listed more than once",
                    f"{len(positions)} times, as {', '.join(labels)}",
                    "must be listed once",
                    level="warning",
                )
            )
    return problems


def _damage(file: str, *, read_pixels: bool) -> str:
    if not Path(file).is_file():
        return "does not exist"
    if read_pixels:
        try:
            read_image(file)
        except DataError as error:
            return str(error)
    return ""
