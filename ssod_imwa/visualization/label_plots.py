"""What a teacher taught over a run, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssod_imwa.visualization.style import class_ticks, color, dash, finish, panels

PREFIX = "labels/"
# Rows of which the panels of classes and scores show the mean: the last of a run.
LAST_SHARE = 0.2


def has_labels(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows of `metrics.json` tell of a teacher's labels."""
    return any(f"{PREFIX}per_image" in row for row in rows)


def labels_figure(rows: Sequence[Mapping[str, Any]], class_counts: Mapping[str, int]) -> Figure:
    """Number and quality of pseudo-labels over the steps, their classes and scores at the end.

    Args:
        rows: of `metrics.json`, with `labels/...`, see `engine.label_hook.LabelHook`.
        class_counts: labeled objects of each class, whose shares are drawn beside the labels';
            empty if they are not known.
    """
    rows = [row for row in rows if f"{PREFIX}per_image" in row]
    last = rows[-max(1, round(LAST_SHARE * len(rows))) :]
    figure, ((number, quality), (classes, scores)) = panels(2, 2)
    _draw_course(number, rows, ["per_image"])
    finish(number, x="global step", y="labels an image")
    _draw_course(quality, rows, ["precision", "recall", "empty_images"])
    quality.set_ylim(-2, 102)  # lines at 0 and 100 are not hidden by the frame
    finish(quality, x="global step", y="%")
    _draw_classes(classes, last, class_counts)
    _draw_scores(scores, rows, last)
    for axis in (number, quality):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


_WORDS = {
    "per_image": "labels that are learned",
    "precision": "labels that are true",
    "recall": "true objects with a label",
    "empty_images": "images without a label",
}


def _draw_course(axis: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A line for each name; members take turns in it, as in the run, or it is their mean."""
    for i, name in enumerate(names):
        points: dict[int, list[float]] = {}
        for row in rows:
            if PREFIX + name in row:
                points.setdefault(row["iteration"] + 1, []).append(row[PREFIX + name])
        if points:
            values = [float(np.mean(of_members)) for of_members in points.values()]
            axis.plot(list(points), values, color=color(i), ls=dash(i), lw=1, label=_WORDS[name])


def _draw_classes(
    axis: Axes, last: Sequence[Mapping[str, Any]], class_counts: Mapping[str, int]
) -> None:
    """Shares of the classes, the most frequent labeled class first."""
    prefix = f"{PREFIX}share-"
    # Of any row: one without a label has no shares.
    shown = dict.fromkeys(name for row in last for name in row if name.startswith(prefix))
    names = [name.removeprefix(prefix) for name in shown]
    names.sort(key=lambda name: -class_counts.get(name, 0))
    shares = [_mean(last, prefix + name) for name in names]
    places = np.arange(len(names))
    axis.bar(places - 0.2, shares, 0.4, color=color(0), label="of the teacher's labels")
    if total := sum(class_counts.values()):
        labeled = [100 * class_counts.get(name, 0) / total for name in names]
        axis.bar(
            places + 0.2, labeled, 0.4, color=color(1), hatch="//", label="of the labeled objects"
        )
    class_ticks(axis, names)
    finish(axis, x="class, by falling labeled share", y="share (%), end of the run")


def _draw_scores(
    axis: Axes, rows: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]]
) -> None:
    """Histograms of scores at the beginning and at the end."""
    prefix = f"{PREFIX}scores-"
    names = sorted({name for row in last for name in row if name.startswith(prefix)})
    places = np.array([float(name.removeprefix(prefix)) for name in names])
    width = 1 / max(len(names), 1)
    first = rows[: len(last)]
    for i, (label, part) in enumerate((("beginning", first), ("end of the run", last))):
        values = [_mean(part, name) for name in names]
        axis.bar(
            places + width * (0.25 + 0.5 * i),
            values,
            0.45 * width,
            color=color(i),
            hatch=("", "//")[i],
            label=label,
        )
    finish(axis, x="score of a label, also below the threshold", y="% of all labels")


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Of the rows that have it: shares of no label at all are not 0; 0 if none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else 0.0
