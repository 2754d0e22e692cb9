"""Where a classifier errs: calibration, confusion, recall and other numbers of each class.

Classes are shown from the most to the least frequent in training; figures are made as in `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ssod_imwa.classification.evaluation import (
    ReliabilityBins,
    expected_calibration_error,
    group_accuracies,
    maximum_calibration_error,
)
from ssod_imwa.visualization.style import (
    COLORMAP,
    COLORS,
    GROUP_COLORS,
    GROUP_MARKERS,
    MOST_NAMES,
    class_ticks,
    color,
    finish,
    marker,
    panels,
    plain,
)

MOST_CELLS = 200
"""Rows of a confusion matrix; more would be thinner than a pixel."""

_MOST_WORDS = 12  # classes up to which there is room for numbers in cells and names at points


def frequency_order(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Classes from the most to the least frequent; of equal ones the lower first.

    Example:
        >>> frequency_order([5, 9, 5])
        array([1, 0, 2])
    """
    return np.argsort(-np.asarray(counts), kind="stable")


def groups_of(counts: Sequence[int] | np.ndarray, *, rule: str = "standard") -> list[str]:
    """many, medium or few for each class, as `group_accuracies` forms the groups.

    Example:
        >>> groups_of([500, 50, 5])
        ['many', 'medium', 'few']
    """
    return [next(iter(group_accuracies(np.ones(1), [n], rule=rule))) for n in np.asarray(counts)]


def reliability_figure(bins: ReliabilityBins) -> Figure:
    """Accuracy against confidence, and how many images have which confidence.

    Bars on the diagonal are calibrated; where confidence is above accuracy, the gap is hatched.
    """
    edges = np.linspace(0, 1, len(bins.images) + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    figure, ((upper,), (lower,)) = panels(
        2, 1, height=3, sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    upper.plot([0, 1], [0, 1], color="black", ls="--", lw=1, label="calibrated")
    upper.bar(middles, bins.accuracy, 0.95 * width, color=COLORS[0], alpha=0.85, label="accuracy")
    upper.bar(
        middles,
        bins.confidence - bins.accuracy,
        0.95 * width,
        bottom=bins.accuracy,
        facecolor="none",
        edgecolor=COLORS[1],
        hatch="///",
        label="gap to mean confidence",
    )
    ece, mce = expected_calibration_error(bins), maximum_calibration_error(bins)
    upper.set_title(f"ECE {100 * ece:.2f} %, largest gap {100 * mce:.1f} %")
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    finish(upper, x="", y="share that is right", legend=None)
    figure.legend(fontsize="small", loc="outside upper left", ncols=3)
    lower.bar(middles, bins.images, 0.95 * width, color=COLORS[2])
    finish(lower, x="confidence (highest probability)", y="images")
    return figure


def confusion_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Which class is taken for which: numbers, shares of each row, and numbers on a log scale.

    Beyond 200 classes neighbors are added up in blocks.

    Args:
        matrix: (C, C) images, row the class and column the prediction; both in the order of
            `names`.
        names: of the classes, the most frequent first.

    Source: the logarithmic one is ECL's figure 10.
    """
    block = -(-len(names) // MOST_CELLS)
    matrix = _in_blocks(np.asarray(matrix), block)
    what = "class, most frequent first" + (f" (blocks of {block})" if block > 1 else "")
    rows = matrix.sum(1, keepdims=True)
    shares = 100 * matrix / np.where(rows > 0, rows, np.nan)
    figure, (axes,) = panels(1, 3, width=5.2, height=4.8)
    drawn: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("images", matrix, {}),
        ("% of the row", shares, {"vmin": 0, "vmax": 100}),
        ("images, logarithmic", matrix, {"norm": LogNorm(1, max(2, matrix.max()))}),
    )
    for axis, (title, values, scale) in zip(axes, drawn, strict=True):
        axis.set_facecolor("#dddddd")  # no image at all, which has no logarithm
        cells = np.ma.masked_less(values, 1) if "norm" in scale else values
        picture = axis.imshow(cells, cmap=COLORMAP, interpolation="nearest", **scale)
        figure.colorbar(picture, ax=axis, shrink=0.75)
        axis.set_title(title)
        axis.set_xlabel(f"predicted {what}")
        axis.set_ylabel(f"true {what}")
        class_ticks(axis, names if block == 1 else names[: len(matrix)], both=True, block=block)
        if len(names) <= _MOST_WORDS and title != "images, logarithmic":
            _write_numbers(axis, values, top=scale.get("vmax", values.max()))
    return figure


def _in_blocks(matrix: np.ndarray, block: int) -> np.ndarray:
    starts = np.arange(0, len(matrix), block)
    return np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)


def _write_numbers(axis: Axes, values: np.ndarray, *, top: float) -> None:
    """In white on dark cells; top is what the brightest color stands for."""
    for i, j in np.ndindex(values.shape):
        if values[i, j] >= 0.5:
            # Not black, which on a page would be the color of its text, in dark mode a light one.
            shade = "#111111" if values[i, j] > 0.6 * top else "white"
            text = f"{values[i, j]:.0f}"
            axis.text(j, i, text, ha="center", va="center", color=shade, fontsize="small")


def recall_figure(
    recalls: np.ndarray,
    counts: Sequence[int] | np.ndarray,
    names: Sequence[str],
    *,
    rule: str = "standard",
) -> Figure:
    """The recall of each class below the number of its training images, groups shaded.

    Args:
        recalls: (C,) fractions of `class_recalls`.
        counts: (C,) training images.
        names: of the classes.
        rule: of the groups, see `group_accuracies`.
    """
    order = frequency_order(counts)
    counts, recalls = np.asarray(counts)[order], 100 * np.asarray(recalls)[order]
    groups = np.array(groups_of(counts, rule=rule))
    at = np.arange(len(order))
    figure, ((upper,), (lower,)) = panels(
        2, 1, width=7, height=2.9, sharex=True, gridspec_kw={"height_ratios": [2, 3]}
    )
    upper.bar(at, counts, 1.0, color="#777777")
    upper.set_yscale("log")
    upper.set_ylim(bottom=0.7)  # so that a bar of 1 is seen
    for group in dict.fromkeys(groups):
        members = groups == group
        first, last = at[members][0] - 0.5, at[members][-1] + 0.5
        for axis in (upper, lower):
            axis.axvspan(first, last, color=GROUP_COLORS[group], alpha=0.1, lw=0, zorder=0)
        mean = _mean(recalls[members])
        lower.hlines(mean, first, last, color=GROUP_COLORS[group], lw=2)
        label = f"{group}: {mean:.1f} % ({members.sum()} of {len(order)} classes)"
        _scatter_group(lower, at[members], recalls[members], group, label, len(order))
    dead = int((recalls == 0).sum())
    title = f"mean {_mean(recalls):.1f} %, classes with recall 0: {dead}"
    lower.set_title(title, fontsize=10)
    lower.set_ylim(-4, 104)
    lower.set_xlim(-0.5, len(order) - 0.5)
    class_ticks(lower, [names[i] for i in order])
    finish(upper, x="", y="training images", legend=None)
    finish(lower, x="class, most frequent first", y="recall (%)", legend=None)
    figure.legend(fontsize="small", loc="outside upper left", ncols=3)
    return figure


def _scatter_group(
    axis: Axes, x: np.ndarray, y: np.ndarray, group: str, label: str, classes: int
) -> None:
    size = 25 if classes <= 100 else 6
    axis.scatter(x, y, size, label=label, color=GROUP_COLORS[group], marker=GROUP_MARKERS[group])


def _mean(values: np.ndarray) -> float:
    """Of the numbers that are there; nan, without a warning, if none is."""
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else np.nan


def class_numbers_figure(
    numbers: Mapping[str, np.ndarray],
    counts: Sequence[int] | np.ndarray,
    names: Sequence[str],
    *,
    rule: str = "standard",
) -> Figure:
    """Numbers of each class against its training images, one panel each.

    Args:
        numbers: what the panel's axis says, with a unit -> (C,).
        counts: (C,) training images.
        names: of the classes, written beside the points of up to 12.
        rule: of the groups.
    """
    counts = np.asarray(counts)
    groups = np.array(groups_of(counts, rule=rule))
    columns = min(2, len(numbers))
    rows = -(-len(numbers) // columns)
    figure, grid = panels(rows, columns, width=5)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(numbers) :]:
        axis.remove()
    for axis, (title, values) in zip(axes, numbers.items(), strict=False):
        for group in [x for x in GROUP_COLORS if x in groups]:
            members = groups == group
            label = f"{group}: mean {_mean(values[members]):.3g}"
            _scatter_group(axis, counts[members], values[members], group, label, len(counts))
        if len(counts) <= _MOST_WORDS:
            for name, n, value in zip(map(plain, names), counts, values, strict=True):
                if np.isfinite(value):
                    axis.annotate(
                        name, (n, value), (3, 3), textcoords="offset points", fontsize="x-small"
                    )
        axis.set_xscale("log")
        axis.margins(y=0.1)  # room for the names
        finish(axis, x="training images of the class", y=title)
    return figure


def experts_figure(
    distances: Mapping[tuple[int, int], np.ndarray],
    counts: Sequence[int] | np.ndarray,
    names: Sequence[str],
    *,
    rule: str = "standard",
) -> Figure:
    """How far apart the features of two experts are, for each class or for groups of many classes.

    Args:
        distances: pair of experts, from 0 -> (C,), see `expert_distances`.
        counts: (C,) training images.
        names: of the classes.
        rule: of the groups, which have a bar each if there are more than 30 classes.

    Source: ECL, equation 12.
    """
    order = frequency_order(counts)
    bars = {pair: values[order] for pair, values in distances.items()}
    labels, what = [names[i] for i in order], "class, most frequent first"
    if len(order) > MOST_NAMES:
        groups = np.array(groups_of(counts, rule=rule))[order]
        labels, what = list(dict.fromkeys(groups)), "classes"
        bars = {
            pair: np.array([_mean(values[groups == group]) for group in labels])
            for pair, values in bars.items()
        }
    figure, ((axis,),) = panels(1, 1, width=max(5.5, 0.35 * len(labels)), height=4)
    width = 0.8 / len(bars)
    for number, ((m, n), values) in enumerate(bars.items()):
        at = np.arange(len(labels)) + (number - (len(bars) - 1) / 2) * width
        label = f"experts {m + 1} and {n + 1}: mean {_mean(values):.3g}"
        axis.bar(at, values, width, color=color(number), label=label)
    class_ticks(axis, labels)
    finish(axis, x=what, y="mean distance of features")
    return figure


def embedding_figure(
    points: np.ndarray, labels: np.ndarray, names: Sequence[str], counts: Sequence[int] | np.ndarray
) -> Figure:
    """Images as points, a color and marker for each class; of up to 12 the names are among them.

    Args:
        points: (N, 2) of `tsne`.
        labels: (N,).
        names: of all classes.
        counts: (C,) training images of all classes.
    """
    figure, ((axis,),) = panels(1, 1, width=6.5, height=5.6)
    present = [c for c in frequency_order(counts) if (labels == c).any()]
    for number, c in enumerate(present):
        of_class = points[labels == c]
        axis.scatter(
            of_class[:, 0],
            of_class[:, 1],
            22,
            color=color(number),
            marker=marker(number // len(COLORS)),
            alpha=0.7,
            lw=0,
            label=f"{plain(names[c])} ({counts[c]})",
        )
        if len(present) <= _MOST_WORDS:
            box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
            x, y = np.median(of_class, axis=0)
            axis.text(x, y, plain(names[c]), ha="center", va="center", weight="bold", bbox=box)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("t-SNE, first dimension (no unit)")
    axis.set_ylabel("t-SNE, second dimension (no unit)")
    axis.legend(
        fontsize="small",
        title="class (training images)",
        title_fontsize="small",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure
