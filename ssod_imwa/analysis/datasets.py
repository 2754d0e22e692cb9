"""How often the classes of data sets occur, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.reports import class_counts
from ssod_imwa.errors import DataError
from ssod_imwa.visualization.plots import classes_figure


def boxes_figure(names: Sequence[str], *, root: str | Path | None = None) -> Figure:
    """Boxes of each class of one or several data sets, without crowds.

    Args:
        names: of detection sets with the same classes, see `load_dataset`; bad records are skipped.
        root: folder of all data sets.

    Raises:
        DataError: a set cannot be read, or the classes differ.
    """
    datasets = [load_dataset(name, root=root, on_bad_record="skip") for name in names]
    first = datasets[0]
    for dataset in datasets[1:]:
        if dataset.classes != first.classes:
            raise DataError(
                f"{first.name} and {dataset.name} have different classes (one histogram needs the "
                "same in the same order; plot them one by one)"
            )
    counts = {}
    for dataset in datasets:
        boxes = class_counts(dataset)
        counts[f"{dataset.name} ({sum(boxes)} boxes on {len(dataset)} images)"] = boxes
    return classes_figure(first.classes, counts, what="boxes")
