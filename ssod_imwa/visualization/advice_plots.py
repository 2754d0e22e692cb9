"""What averaging did over a run, by the numbers of IMWA.ADVISE, as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssod_imwa.runs.advice import CLOSE, AverageNumbers, advise
from ssod_imwa.visualization.style import color, finish, marker, panels

Lines = Mapping[str, Sequence[float | None]]


def advice_figure(numbers: Mapping[int, AverageNumbers]) -> Figure:
    """Losses of members and averages, gain, barrier, and distance over episodes.

    Above it stands the advice after the last average.

    Args:
        numbers: by the episode's number as people count, see `numbers_in`; at least one.
    """
    figure, ((losses, shares), (distance, rate)) = panels(2, 2)
    course = list(numbers.values())
    episodes = list(numbers)
    lines: Lines = {
        "members, mean": [x.members for x in course],
        "worst member": [x.worst for x in course],
        "average": [x.average for x in course],
        "average, batch norms re-estimated": [x.recomputed for x in course],
    }
    _draw(losses, episodes, lines, "loss on training images")
    if min(x.best for x in course) > 0:
        losses.set_yscale("log")
    lines = {
        "gain of the average": [100 * x.gain for x in course],
        "barrier (above 0: worse than every member)": [100 * x.barrier for x in course],
    }
    _draw(shares, episodes, lines, "% of the members' loss")
    shares.axhline(0, color="black", lw=0.8)
    _draw(distance, episodes, {"last member": [x.distance for x in course]}, "relative distance")
    distance.axhline(CLOSE, color="black", lw=0.8, ls=":")
    _draw(rate, episodes, {"at the average": [100 * x.rate for x in course]}, "rate (% of highest)")
    figure.suptitle(textwrap.fill(advise(course).text, 100), fontsize="medium")
    return figure


def _draw(
    axis: Axes,
    episodes: list[int],
    lines: Lines,
    what: str,
) -> None:
    for number, (name, line) in enumerate(lines.items()):
        points = [(x, y) for x, y in zip(episodes, line, strict=True) if y is not None]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=color(number), marker=marker(number), label=name)
    finish(axis, x="episode", y=what)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
