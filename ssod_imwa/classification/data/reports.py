"""What is wrong in a classification set and what its classes hold: lines of text."""

from __future__ import annotations

from pathlib import Path

from ssod_imwa.classification.data.catalog import load_images, load_unlabeled
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.validation import find_image_problems
from ssod_imwa.data.reports import Report, imbalance_lines, is_sound, problem_lines, summary_line
from ssod_imwa.errors import one_line


def check_images(
    name: str,
    *,
    root: str | Path | None = None,
    labeled: bool = True,
    read_pixels: bool = True,
    show_all: bool = False,
) -> Report:
    """What is wrong in a data set of `load_images`, and the images of each class.

    Args:
        name: see `load_images`.
        root: folder of all data sets.
        labeled: whether it is for DATASETS.TRAIN or TEST; if not, see `load_unlabeled`.
        read_pixels: open and decode every image.
        show_all: see `problem_lines`.

    Raises:
        DataError: it cannot be read at all.
    """
    if not labeled:
        return _check_unlabeled(name, root, read_pixels=read_pixels, show_all=show_all)
    dataset = load_images(name, root=root)
    problems = find_image_problems(dataset, read_pixels=read_pixels)
    lines = [
        *problem_lines(problems, show_all=show_all),
        summary_line(name, images=len(dataset), problems=problems),
        *class_lines(dataset),
    ]
    return Report(tuple(lines), is_sound=is_sound(problems))


def _check_unlabeled(
    name: str, root: str | Path | None, *, read_pixels: bool, show_all: bool
) -> Report:
    dataset = load_unlabeled(name, root=root, classes=())
    problems = find_image_problems(dataset, read_pixels=read_pixels)
    summary = summary_line(name, images=len(dataset), problems=problems)
    lines = [*problem_lines(problems, show_all=show_all), summary]
    return Report(tuple(lines), is_sound=is_sound(problems))


def class_lines(dataset: ClassificationDataset) -> list[str]:
    """Images of each class, and how imbalanced they are."""
    names = [one_line(name) for name in dataset.classes]
    width = max(map(len, names))
    lines = [f"  {'class':{width}} {'images':>7}"]
    for name, count in zip(names, dataset.counts, strict=True):
        lines.append(f"  {name:{width}} {count:>7}")
    return lines + imbalance_lines(dataset.counts, "images")
