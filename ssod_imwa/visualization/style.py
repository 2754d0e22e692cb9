"""How figures look: colors, markers and dashes that stay apart in gray and to all eyes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette; lines differ in marker or dash, too, for prints in gray."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
DPI = 120
COLORMAP = "viridis"  # even in lightness, so it survives a print in gray

Place = Literal["best", "right", "below"]

MOST_NAMES = 30
"""Classes up to which each is named on an axis."""

_STEPS = tuple(digit * 10**power for power in range(8) for digit in (1, 2, 5))

GROUP_COLORS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00"}
GROUP_MARKERS = {"many": "o", "medium": "s", "few": "^"}


def color(number: int) -> str:
    """The color of the line with this number; they repeat after seven."""
    return COLORS[number % len(COLORS)]


def marker(number: int) -> str:
    """The marker of the line with this number."""
    return MARKERS[number % len(MARKERS)]


def dash(number: int) -> str:
    """The dash of the line with this number."""
    return DASHES[number % len(DASHES)]


def plain(name: str) -> str:
    r"""A name that somebody chose, such as that of a class, as a figure shows it as it is.

    Two dollars would begin and end a formula, and legends leave out what begins with an underscore.

    Example:
        >>> plain("$a_$"), plain("_b"), plain("c_1")
        ('\\$a_\\$', ' _b', 'c_1')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def panels(
    rows: int, columns: int, *, width: float = 5.5, height: float = 3.4, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure without pyplot and its axes, by row and column; width and height are a panel's."""
    size = (1 + width * columns, 0.4 + height * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [list(row) for row in axes]


def finish(axis: Axes, *, x: str, y: str, legend: Place | None = "best") -> None:
    """Labels, a faint grid and, if something has a label, a legend.

    Args:
        axis: what is finished.
        x: what the horizontal axis is, with a unit; no formula.
        y: what the vertical axis is, with a unit; no formula.
        legend: where it is: inside, beside the axis or below it; None for none.
    """
    axis.set_xlabel(plain(x))
    axis.set_ylabel(plain(y))
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    if legend is None or not axis.get_legend_handles_labels()[0]:
        return
    if legend == "right":
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif legend == "below":
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    else:
        axis.legend(fontsize="small", loc="best")


def class_ticks(axis: Axes, names: Sequence[str], *, both: bool = False, block: int = 1) -> None:
    """Names of classes below an axis (and beside it, if `both`), or ranks if they are many.

    Args:
        axis: with the classes at 0, 1, ...
        names: of the classes; of more than 30 every so many gets its rank, from 0.
        both: name the rows, too.
        block: classes that stand at one place together, for the ranks.
    """
    if len(names) <= MOST_NAMES and block == 1:
        at, labels = [float(i) for i in range(len(names))], list(map(plain, names))
    else:
        classes = len(names) * block
        step = next(x for x in _STEPS if classes <= 8 * x)
        ranks = range(0, classes, step)
        at, labels = [rank / block for rank in ranks], [str(rank) for rank in ranks]
    # About so many letters fit side by side.
    axis.set_xticks(at, labels, rotation=90 if sum(map(len, labels)) > 45 else 0)
    if both:
        axis.set_yticks(at, labels)
