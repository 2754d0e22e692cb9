"""What surrounds and connects trained weights: landscapes, lines, members, and decisions on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssod_imwa.visualization.style import (
    COLORMAP,
    COLORS,
    GROUP_COLORS,
    color,
    dash,
    finish,
    marker,
    panels,
    plain,
)

_TITLES = {"top1": "top-1", "h_mean": "H-mean", "g_mean": "G-mean"}


def title_of(name: str) -> str:
    """How a metric is called in figures and tables."""
    return _TITLES.get(name, name)


def landscape_figure(
    steps: Sequence[float] | np.ndarray,
    directions: Sequence[Mapping[str, np.ndarray]],
    *,
    units: Mapping[str, str],
) -> Figure:
    """Numbers along several random directions as thin lines, and their mean; a panel for each.

    Args:
        steps: ε, 0 is the trained model.
        directions: numbers of each, see `landscape_along`.
        units: name of a number -> what its axis says.

    Source: ECL, figure 8.
    """
    figure, (axes,) = panels(1, len(units), width=5, height=4)
    for axis, (name, unit) in zip(axes, units.items(), strict=True):
        lines = np.stack([direction[name] for direction in directions])
        for number, line in enumerate(lines):
            label = f"each of {len(lines)} directions" if number == 0 else None
            axis.plot(steps, line, color=COLORS[5], lw=0.8, label=label)
        axis.plot(steps, lines.mean(0), color=COLORS[0], lw=2, marker="o", ms=3, label="mean")
        axis.axvline(0, color="black", ls=":", lw=1)
        if _is_wide(lines):
            axis.set_yscale("log")
        finish(axis, x="step ε along a filter-normalized direction", y=unit)
    return figure


def landscape_map(
    steps: Sequence[float] | np.ndarray,
    plane: Mapping[str, np.ndarray],
    *,
    units: Mapping[str, str],
) -> Figure:
    """Numbers over the plane of two random directions, as contours; the cross is the model.

    Args:
        steps: of both directions.
        plane: (steps, steps) for each name, see `landscape_across`.
        units: name of a number -> what it is.
    """
    figure, (axes,) = panels(1, len(units), width=5, height=4.4)
    for axis, (name, unit) in zip(axes, units.items(), strict=True):
        values = plane[name].T  # the first direction goes to the right
        levels = np.geomspace(values.min(), values.max(), 16) if _is_wide(values) else None
        filled = axis.contourf(
            steps,
            steps,
            values,
            levels=15 if levels is None else levels,
            norm=None if levels is None else LogNorm(),
            cmap=COLORMAP,
        )
        bar = figure.colorbar(filled, ax=axis, label=unit, shrink=0.8)
        if levels is not None:
            ticks = levels[::3].tolist()
            bar.set_ticks(ticks, labels=[f"{level:.3g}" for level in ticks])
            bar.minorticks_off()
        axis.plot(0, 0, marker="x", color="white", ms=9, mew=2)
        axis.set_aspect("equal")
        axis.set_xticks(np.linspace(steps[0], steps[-1], 5))
        axis.set_yticks(np.linspace(steps[0], steps[-1], 5))
        axis.set_xlabel("step ε along direction 1")
        axis.set_ylabel("step ε along direction 2")
    return figure


def _is_wide(values: np.ndarray) -> bool:
    """Whether a linear axis would show nothing but the largest values, as of losses."""
    return bool(values.min() > 0 and values.max() > 50 * values.min())


def interpolation_figure(
    shares: Sequence[float] | np.ndarray,
    averages: Mapping[str, np.ndarray],
    *,
    names: tuple[str, str],
    recomputed: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Metrics and loss of (1 − λ) A + λ B over λ.

    Args:
        shares: λ.
        averages: "loss" and metrics in percent -> (shares,).
        names: of A and B.
        recomputed: the same with batch norms re-estimated, drawn dashed.

    Source: BTM, figures 1 and 2.
    """
    figure, (axes,) = panels(1, 2, width=5, height=4)
    metrics = [name for name in averages if name != "loss"]
    for axis, chosen in zip(axes, (metrics, ["loss"]), strict=True):
        for number, name in enumerate(chosen):
            style: dict[str, Any] = {"color": color(number), "marker": marker(number), "ms": 4}
            axis.plot(shares, averages[name], label=title_of(name), **style)
            if recomputed is not None:
                label = f"{title_of(name)}, batch norms re-estimated"
                axis.plot(shares, recomputed[name], ls="--", mfc="none", label=label, **style)
        finish(axis, x="λ", y="test metrics (%)" if chosen == metrics else "test cross-entropy")
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    one, other = map(plain, names)
    figure.suptitle(f"(1 − λ) A + λ B:  A = {one},  B = {other}", fontsize=10)
    return figure


def members_figure(
    epochs: Sequence[float],
    members: np.ndarray,
    averages: np.ndarray,
    distances: Mapping[str, np.ndarray],
    *,
    metric: str,
) -> Figure:
    """What the average of the members' weights gains over the training, and how far apart they are.

    Args:
        epochs: when the snapshots were taken.
        members: (M, epochs), the metric of each member in percent.
        averages: (epochs,), of the average of their weights.
        distances: part of the network -> (epochs,), ‖θ1 − θ2‖₂ averaged over pairs; "whole" is all.
        metric: its name.

    Source: IMWA, figure 1.
    """
    figure, (axes,) = panels(1, 3, width=4.6, height=4)
    left, middle, right = axes
    for number, line in enumerate(members):
        left.plot(
            epochs,
            line,
            color=color(number + 1),
            marker=marker(number + 1),
            ls=dash(number + 1),
            ms=4,
            lw=1,
            label=f"member {number + 1}",
        )
    left.plot(epochs, averages, color=COLORS[0], marker="o", ms=4, lw=2, label="average")
    gain = averages - members.max(0)
    middle.axhline(0, color="black", lw=1)
    middle.bar(epochs, gain, 0.8 * _gap(epochs), color=COLORS[0])
    for number, (part, line) in enumerate(distances.items()):
        line_color, width = ("black", 2) if part == "whole" else (color(number), 1)
        right.plot(
            epochs, line, marker=marker(number), ms=4, label=part, color=line_color, lw=width
        )
    name = title_of(metric)
    for axis, label in (
        (left, f"{name} (%)"),
        (middle, f"gain in {name} over the best member (points)"),
        (right, "distance of members ‖θ₁ − θ₂‖"),
    ):
        finish(
            axis, x="epochs of each member", y=label, legend="right" if axis is right else "best"
        )
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=max(epochs) > 5))
    return figure


def _gap(values: Sequence[float]) -> float:
    return float(np.diff(values).min()) if len(values) > 1 else 1.0


def tau_figure(
    sweeps: Mapping[str, tuple[Sequence[float], Mapping[str, np.ndarray]]],
    *,
    constant: Mapping[str, float],
) -> Figure:
    """Accuracy of all, many, medium and few classes over τ, a panel for each kind of decision.

    Args:
        sweeps: title -> (τ, metric -> percent (taus,)); the best τ by top-1 is marked.
        constant: label -> top-1 in percent that does not depend on τ, drawn as a line.
    """
    columns = min(2, len(sweeps))
    figure, grid = panels(-(-len(sweeps) // columns), columns, height=4, sharey=True)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(sweeps) :]:
        axis.remove()
    for axis, (title, (taus, metrics)) in zip(axes, sweeps.items(), strict=False):
        chosen = [name for name in ("top1", "many", "medium", "few") if name in metrics]
        for number, name in enumerate(chosen):
            axis.plot(
                taus,
                metrics[name],
                marker=marker(number),
                ms=4,
                label=title_of(name),
                color=GROUP_COLORS.get(name, "black"),
                lw=2 if name == "top1" else 1,
            )
        best = int(np.argmax(metrics["top1"]))
        label = f"best τ = {taus[best]:g}: {metrics['top1'][best]:.1f} %"
        axis.axvline(taus[best], color="black", ls=":", lw=1, label=label)
        for number, (label, value) in enumerate(constant.items()):
            text = f"{label}: {value:.1f} %"
            axis.axhline(value, color=COLORS[3], ls=dash(number + 1), lw=1, label=text)
        axis.set_title(title, fontsize=10)
        finish(axis, x="τ", y="accuracy (%)", legend="below")
    return figure
