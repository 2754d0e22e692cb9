"""How each class fared during training, from the rows of `ClassTrackingHook`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssod_imwa.analysis.class_figures import frequency_order
from ssod_imwa.visualization.plots import MetricsError
from ssod_imwa.visualization.style import COLORMAP, finish, panels, plain

TITLES = {
    "accuracy": "training accuracy (%)",
    "gradient_norm": "norm of feature gradients",
    "ratio": "predicted as c / images of c",
    "deviation": "feature deviation dis(c)",
}
MOST_LINES = 10


def class_curves_figure(
    rows: Sequence[Mapping[str, Any]],
    counts: Sequence[int] | np.ndarray,
    names: Sequence[str],
    *,
    iterations_per_epoch: float,
) -> Figure:
    """A panel for each number and member, a line for each class, colored by its training images.

    More than ten classes are drawn as ten bands of classes of like frequency, each band's mean.

    Args:
        rows: of `classes.json`.
        counts: (C,) training images.
        names: of the classes.
        iterations_per_epoch: own iterations of a member in which it sees all images once.

    Raises:
        MetricsError: there is no row, or rows have another number of classes.

    Source: MFW, figures 1, 3, 4 and 7.
    """
    if not rows:
        raise MetricsError("there are no rows of classes (CLS.TRACK_PERIOD 0 writes none)")
    counts = np.asarray(counts)
    if any(len(row["accuracy"]) != len(counts) for row in rows):
        raise MetricsError(f"rows of classes are not of {len(counts)} classes (of another run?)")
    bands = np.array_split(frequency_order(counts), min(MOST_LINES, len(counts)))
    colors, scale = _color_scale(counts)
    members = sorted({row["member"] for row in rows})
    figure, grid = panels(len(TITLES), len(members), width=6, height=2.5, sharex=True, sharey="row")
    for line, (name, title) in zip(grid, TITLES.items(), strict=True):
        for axis, member in zip(line, members, strict=True):
            member_rows = [row for row in rows if row["member"] == member]
            epochs = [(row["t"] + 1) / iterations_per_epoch for row in member_rows]
            values = np.array([row[name] for row in member_rows], dtype=np.float64)
            if name == "accuracy":
                values = 100 * values
            _draw(axis, epochs, values, bands, counts, names, colors, scale)
            finish(axis, x="", y=title if axis is line[0] else "", legend=None)
            if len(members) > 1 and line is grid[0]:
                axis.set_title(f"member {member + 1}")
    for axis in grid[2]:
        axis.axhline(1, color="black", ls=":", lw=1)  # predicted as often as it occurs
    for axis in grid[-1]:
        axis.set_xlabel("epochs of a member")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=axis.get_xlim()[1] > 5))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside upper left", ncols=2)
    bar = ScalarMappable(scale, colors)
    axes = [axis for line in grid for axis in line]
    figure.colorbar(bar, ax=axes, label="training images of the class", aspect=50)
    return figure


def _color_scale(counts: np.ndarray) -> tuple[Colormap, Normalize]:
    # Without the last, light part, which is hard to see on white.
    colors = ListedColormap(colormaps[COLORMAP](np.linspace(0.88, 0, 256)))
    low, high = max(1, counts.min()), counts.max()
    return colors, LogNorm(low, high) if high > low else Normalize(low - 1, high + 1)


def _draw(
    axis: Axes,
    epochs: Sequence[float],
    values: np.ndarray,
    bands: Sequence[np.ndarray],
    counts: np.ndarray,
    names: Sequence[str],
    colors: Colormap,
    scale: Normalize,
) -> None:
    for number, band in enumerate(bands):
        images = float(np.exp(np.log(np.maximum(counts[band], 1)).mean()))
        outer = number in (0, len(bands) - 1)
        who = plain(names[band[0]]) if len(band) == 1 else f"{len(band)} classes"
        kind = "most" if number == 0 else "least"
        missing = np.isnan(values[:, band])
        mean = np.where(missing, 0, values[:, band]).sum(1) / np.maximum((~missing).sum(1), 1)
        axis.plot(
            epochs,
            np.where(missing.all(1), np.nan, mean),
            color=colors(scale(images)),
            ls="-" if number == 0 else "--" if outer else "-",
            lw=2 if outer else 1,
            marker="o" if len(epochs) == 1 else None,
            label=f"{kind} frequent: {who} ({images:.0f} images)" if outer else None,
        )
