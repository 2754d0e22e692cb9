"""What is wrong in a detection set, what its classes hold: lines of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ssod_imwa.data.reports import Report, imbalance_lines, is_sound, problem_lines, summary_line
from ssod_imwa.detection.data.catalog import read_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset
from ssod_imwa.detection.data.validation import find_problems
from ssod_imwa.errors import one_line


def check_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    labeled: bool = True,
    read_pixels: bool = True,
    show_all: bool = False,
) -> Report:
    """What is wrong in a data set of `load_dataset`, and images and boxes of each class.

    Args:
        name: see `load_dataset`.
        root: folder of all data sets.
        labeled: whether to read and check labels.
        read_pixels: open and decode every image.
        show_all: see `problem_lines`.

    Raises:
        DataError: it cannot be read at all.
    """
    dataset, problems = read_dataset(name, root=root, labeled=labeled)
    problems += find_problems(dataset, read_pixels=read_pixels)
    lines = [
        *problem_lines(problems, show_all=show_all),
        summary_line(name, images=len(dataset), problems=problems),
        *class_lines(dataset),
        *box_lines(dataset),
    ]
    return Report(tuple(lines), is_sound=is_sound(problems))


def class_counts(dataset: DetectionDataset) -> list[int]:
    """Boxes of each class 0..C-1, without crowds; unlabeled images count as empty."""
    labels = [a.labels[~a.crowd] for a in _annotations(dataset)]
    everything = np.concatenate([np.zeros(0, np.int64), *labels])
    return np.bincount(everything, minlength=len(dataset.classes)).tolist()


def class_lines(dataset: DetectionDataset) -> list[str]:
    """Images and boxes of each class, and how imbalanced they are."""
    annotations = _annotations(dataset)
    if not annotations or not dataset.classes:
        return ["  no labels"]
    names = [one_line(str(name)) for name in dataset.classes]
    width = max(map(len, names))
    lines = [f"  {'class':{width}} {'images':>7} {'boxes':>7} {'difficult':>9} {'crowds':>7}"]
    boxes = class_counts(dataset)
    for label, name in enumerate(names):
        of_class = [a.labels == label for a in annotations]
        pairs = list(zip(of_class, annotations, strict=True))
        images = sum(bool((chosen & ~a.crowd).any()) for chosen, a in pairs)
        crowds = sum(int((chosen & a.crowd).sum()) for chosen, a in pairs)
        difficult = sum(int((chosen & a.difficult).sum()) for chosen, a in pairs)
        lines.append(f"  {name:{width}} {images:>7} {boxes[label]:>7} {difficult:>9} {crowds:>7}")
    return lines + imbalance_lines(boxes, "boxes")


def box_lines(dataset: DetectionDataset) -> list[str]:
    """How large and how tall boxes are: what anchors and the size of images are chosen by.

    The edge of a box is the root of its area. Crowds and boxes without area do not count.
    """
    edges, shares, ratios = [], [], []
    for record in dataset.records:
        if record.annotations is None:
            continue
        sizes = record.annotations.boxes[:, 2:] - record.annotations.boxes[:, :2]
        counted = (
            ~record.annotations.crowd & (sizes > 0).all(axis=1) & np.isfinite(sizes).all(axis=1)
        )
        edge = np.sqrt(sizes[counted].prod(axis=1))
        edges.append(edge)
        shares.append(100 * edge / min(record.width, record.height))
        ratios.append(sizes[counted, 1] / sizes[counted, 0])
    if not edges or not len(np.concatenate(edges)):
        return []
    pixels, percent, tall = (
        ", ".join(f"{x:.3g}" for x in np.percentile(np.concatenate(values), (5, 50, 95)))
        for values in (edges, shares, ratios)
    )
    return [
        "  boxes at 5, 50 and 95 %: "
        f"edge {pixels} px, {percent} % of the image's shorter edge; height over width {tall}"
    ]


def _annotations(dataset: DetectionDataset) -> list[Annotations]:
    return [r.annotations for r in dataset.records if r.annotations is not None]
