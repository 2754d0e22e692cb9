"""Images in a folder, without labels."""

from __future__ import annotations

import os
from pathlib import Path

from ssod_imwa.data.image_files import image_paths, image_size
from ssod_imwa.data.problems import Problem, report
from ssod_imwa.detection.data.records import DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError


def load_folder(
    folder: str | Path, *, name: str, problems: list[Problem] | None = None
) -> DetectionDataset:
    """All images below a folder, unlabeled, in the order of their paths.

    An image's id is its path relative to the folder. Files that do not end in one of
    `IMAGE_SUFFIXES` and hidden ones are left alone.

    Args:
        folder: searched with all its subfolders.
        name: name of the data set.
        problems: receives files that have an image's name but are none; without it the first of
            them raises.

    Raises:
        DataError: the folder is missing, or see `problems`.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DataError(f"image folder {folder} does not exist")
    named = [(path.relative_to(folder).as_posix(), str(path)) for path in image_paths(folder)]
    return DetectionDataset(name, unlabeled_records(named, problems), ())


def unlabeled_records(
    named: list[tuple[str, str]], problems: list[Problem] | None
) -> tuple[ImageRecord, ...]:
    """Records of (id, image file) pairs, with the sizes found in the files."""
    records = []
    for image_id, path in named:
        try:
            width, height = image_size(path)
        except DataError as error:
            rule = "every image has a readable header"
            report(Problem(path, f"image {image_id}", "no image", str(error), rule), problems)
            continue
        records.append(ImageRecord(path, image_id, width, height))
    return tuple(records)
