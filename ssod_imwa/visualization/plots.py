"""Curves of a run and histograms of a data set, as matplotlib figures.

Figures are made without pyplot, so no window system is needed and none of its state is touched;
`figure.savefig(path)` writes them.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssod_imwa.engine.checkpoint.atomic import write_output
from ssod_imwa.errors import UserError
from ssod_imwa.runs.advice import numbers_in
from ssod_imwa.runs.burn_in import BurnIn, burn_in_of
from ssod_imwa.runs.results import (
    FILE_NAME,
    MODELS,
    Evaluation,
    Results,
    main_metrics,
    read_results,
)
from ssod_imwa.visualization.advice_plots import advice_figure
from ssod_imwa.visualization.label_plots import has_labels, labels_figure
from ssod_imwa.visualization.style import DPI, color, dash, marker, plain

_TITLES = {
    "pseudo_boxes": "pseudo-labels per image",
    "pseudo_score": "mean score of pseudo-labels",
}


class MetricsError(UserError):
    """A metrics file is missing or holds no training."""


def run_figures(run_dir: str | Path, *, metrics: Sequence[str] | None = None) -> dict[str, Figure]:
    """The figures of a run that has begun, by file name.

    "episodes.png" is there once an episode was evaluated, "course.png" if it was inside episodes,
    "labels.png" once a teacher labels, "advice.png" with IMWA.ADVISE.

    Args:
        run_dir: its OUTPUT_DIR.
        metrics: see `episodes_figure`.

    Raises:
        UserError: the run has trained nothing yet, or has not measured one of the metrics.
    """
    rows = read_metrics(Path(run_dir) / "metrics.json")
    results = read_results(run_dir) if (Path(run_dir) / FILE_NAME).exists() else None
    burn_in = None if results is None else burn_in_of(results)
    figures = {"training.png": training_figure(rows, burn_in=burn_in)}
    if numbers := numbers_in(rows):
        number = (lambda e: e + 1) if results is None else results.episode_number
        figures["advice.png"] = advice_figure({number(e): x for e, x in numbers.items()})
    if has_labels(rows):
        figures["labels.png"] = labels_figure(rows, results.class_counts if results else {})
    stages = set() if results is None else {x.stage for x in results.evaluations}
    if results is not None and (stages - {"running"} or (metrics is not None and not stages)):
        figures["episodes.png"] = episodes_figure(results, metrics=metrics, burn_in=burn_in)
    if results is not None and "running" in stages:
        figures["course.png"] = course_figure(results, metrics=metrics, burn_in=burn_in)
    for figure in figures.values():
        _name(figure, Path(run_dir).resolve().name)
    return figures


def _name(figure: Figure, run: str) -> None:
    """Put the name of the run above what the title says."""
    title = figure.get_suptitle()
    figure.suptitle(f"{plain(run)}\n{title}" if title else plain(run))


def mark_burn_in(axis: Axes, ends: Sequence[float]) -> None:
    """Lines where burn-in ends, on the scale of the axis; one of them is named."""
    for number, end in enumerate(ends):
        label = "end of burn-in" if number == 0 else None
        axis.axvline(end, color="0.5", lw=1, ls=(0, (1, 2)), label=label, zorder=0)


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> list[Path]:
    """Write figures to a folder, which is made if need be; the files.

    Raises:
        OutputError: one cannot be written.
    """
    pictures = {}
    for name, figure in figures.items():  # all are drawn before one is written
        pictures[Path(folder, name)] = buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(name).suffix[1:])
    for path, buffer in pictures.items():
        write_output(path, buffer.getvalue())
    return list(pictures)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.json`, one JSON object a line; a last, torn line is left out.

    Raises:
        MetricsError: the file is missing or no text, or another line than the last is no object.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MetricsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MetricsError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the run is writing it, or was killed while it did
                break
            raise MetricsError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise MetricsError(f"{path}, line {number}, is not a JSON object: {line[:60]}")
        rows.append(row)
    return rows


def training_figure(rows: Sequence[Mapping[str, Any]], *, burn_in: BurnIn | None = None) -> Figure:
    """Losses, learning rate and pseudo-labels of a run; steps and members are counted from 1.

    The left column goes by the global step, in which members alternate; the right column by each
    member's own iteration t, one line per member, so that members can be compared. A run of one
    member has only the left column, as the two are the same, and a run of members at once only the
    right one, as a global step is the own iteration of all of them.

    Args:
        rows: of `metrics.json`: `iteration` is the global step; `member` and `t` are the member and
            its own iteration (a row without them is of member 0, with t the global step).
        burn_in: its end is marked, for each member where they alternate.

    Raises:
        MetricsError: no row has a loss.
    """
    rows = [row for row in rows if "total_loss" in row]
    if not rows:
        raise MetricsError("metrics hold no row with total_loss (did the run train yet?)")
    names = sorted({name for row in rows for name in row})
    panels = {
        "total loss": ["total_loss"],
        "losses": [x for x in names if x.startswith("loss") and "pseudo" not in x],
        "pseudo-label losses": [x for x in names if x.startswith("loss") and "pseudo" in x],
        "learning rate": ["lr"] if "lr" in names else [],
    }
    for name in names:
        if "pseudo" in name and not name.startswith("loss"):
            panels[_TITLES.get(name, name.replace("_", " "))] = [name]
    panels = {title: chosen for title, chosen in panels.items() if chosen}
    columns = {"iteration (optimizer steps)": _draw_by_step}
    if len({row.get("member", 0) for row in rows}) > 1:
        columns = {"own iteration t (optimizer steps of one member)": _draw_by_member}
        if len({row.get("iteration") for row in rows}) == len(rows):  # members take turns
            columns = {"global step (optimizer steps of all members)": _draw_by_step, **columns}
    size = (1 + 7 * len(columns), 2.8 * len(panels))
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    axes = figure.subplots(len(panels), len(columns), squeeze=False, sharex="col")
    for row_of_axes, (title, chosen) in zip(axes, panels.items(), strict=True):
        for axis, draw in zip(row_of_axes, columns.values(), strict=True):
            draw(axis, rows, chosen)
            if burn_in is not None:
                by_step = draw is _draw_by_step
                mark_burn_in(axis, burn_in.global_steps if by_step else [burn_in.iterations])
            axis.set_ylabel(plain(title))
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            # Beside the panel: up to eight entries would hide the curves.
            axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
            if title == "learning rate":
                # From 0, else the last of a warm-up fills the panel.
                axis.set_ylim(0, 1.05 * max(row.get("lr", 0) for row in rows) or 1)
    for axis, clock in zip(axes[-1], columns, strict=True):
        axis.set_xlabel(clock)
    return figure


def episodes_figure(
    results: Results, *, metrics: Sequence[str] | None = None, burn_in: BurnIn | None = None
) -> Figure:
    """Figures after each episode: members before averaging as dots, averages as lines.

    Episodes and members are counted from 1; episode 0 is the part that members have in common.

    Args:
        results: of one run.
        metrics: which figures, in percent, one panel each; None takes every AP and AP50.
        burn_in: its end is marked.

    Raises:
        MetricsError: the run has no evaluation, or none with one of the figures.
    """
    metrics = _measured(results, metrics)
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained", dpi=DPI)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axis in list(panels)[len(metrics) :]:
        axis.remove()
    evaluations = [x for x in results.evaluations if x.stage != "running"]
    for axis, metric in zip(figure.axes, metrics, strict=True):
        for number, model in enumerate(MODELS):
            of_model = [x for x in evaluations if x.model == model]
            _draw_episodes(axis, results, of_model, metric, color=color(number), model=model)
        axis.set_xlabel("episode")
        axis.set_ylabel(plain(f"{metric} (%)"))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        first, last = (
            results.episode_number(x) for x in (0, max(x.episode for x in results.evaluations))
        )
        axis.set_xlim(first - 0.5, last + 0.5)
        if burn_in is not None and burn_in.episodes > first - 0.5:
            mark_burn_in(axis, [burn_in.episodes])
        axis.grid(alpha=0.3)
        axis.legend()
    members, episodes = results.imwa["members"], results.imwa["episodes"]
    figure.suptitle(
        f"{results.method} on {plain(results.dataset)}, M = {members}, E = {episodes}, "
        f"T = {results.iterations}, seed {results.seed}"
    )
    return figure


def course_figure(
    results: Results, *, metrics: Sequence[str] | None = None, burn_in: BurnIn | None = None
) -> Figure:
    """Figures over a member's own iterations: a line for each member, a marker for each average.

    Args:
        results: of one run that was evaluated inside episodes.
        metrics: which figures, in percent, one panel each; None takes every AP and AP50.
        burn_in: its end is marked.

    Raises:
        MetricsError: see `episodes_figure`.
    """
    metrics = _measured(results, metrics)
    size = (8, 2.8 * len(metrics))
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    members = sorted({x.member for x in results.evaluations if x.member is not None})
    for axis, metric in zip(axes, metrics, strict=True):
        for number, model in enumerate(MODELS):
            of_model = [x for x in results.evaluations if x.model == model and x.t is not None]
            for i, member in enumerate(members):
                line = [x for x in of_model if x.member == member]
                label = f"{model}, member {member + 1}" if len(members) > 1 else model
                _draw_course(axis, line, metric, color=color(number), ls=dash(i), label=label)
            averages = [x for x in of_model if x.stage in ("average", "final")]
            shape = "o" if model == "teacher" else "s"
            label = f"{model}, average" if len(members) > 1 else f"{model}, episode's end"
            _draw_course(
                axis, averages, metric, color=color(number), ls="", marker=shape, label=label
            )
        if burn_in is not None:
            mark_burn_in(axis, [burn_in.iterations])
        axis.set_ylabel(plain(f"{metric} (%)"))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[-1].set_xlabel("own iteration t (optimizer steps of one member)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{results.method} on {plain(results.dataset)}, seed {results.seed}")
    return figure


def _measured(results: Results, metrics: Sequence[str] | None) -> Sequence[str]:
    """The figures to draw, all of which the run has."""
    metrics = main_metrics([results]) if metrics is None else metrics
    known = {name for item in results.evaluations for name in item.metrics}
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise MetricsError(
            f"results hold no figure {', '.join(unknown) or 'AP or AP50'} (choose from "
            f"{', '.join(sorted(known)) or 'none: the run made no evaluation'})"
        )
    return metrics


def _draw_course(axis: Axes, line: Sequence[Evaluation], metric: str, **style: Any) -> None:
    if line:
        iterations = [x.t + 1 for x in line if x.t is not None]
        axis.plot(iterations, [x.metrics.get(metric, math.nan) for x in line], **style)


def classes_figure(
    classes: Sequence[str], counts: Mapping[str, Sequence[int]], *, what: str
) -> Figure:
    """How often classes occur, in one or several data sets, from the most to the least frequent.

    The axis of counts is logarithmic if the largest count is at least 10 times the smallest, as
    long-tailed data have it.

    Args:
        classes: names.
        counts: for each entry of the legend a number for each class; the first decides the order.
        what: is counted.

    Raises:
        ValueError: there are no counts.
    """
    if not counts:
        raise ValueError("no counts are given (at least those of one data set are needed)")
    table = np.array(list(counts.values())).reshape(-1, len(classes))
    order = np.argsort(-table[0], kind="stable")
    figure = Figure(figsize=(max(6, 0.35 * len(classes)), 4.5), layout="constrained", dpi=DPI)
    axis = figure.subplots()
    width = 0.8 / len(counts)
    for i, label in enumerate(counts):
        at = np.arange(len(classes)) + (i - (len(counts) - 1) / 2) * width
        axis.bar(at, table[i][order], width, color=color(i), label=plain(label))
    if table.max() >= 10 * max(1, table.min()):
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)  # so that a bar of 1 is seen; an empty class has none
    axis.set_xticks(np.arange(len(classes)), [plain(classes[i]) for i in order], rotation=90)
    axis.set_xlabel("class")
    axis.set_ylabel(what)
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    return figure


def _draw_by_step(axis: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        steps, values = _column(rows, name, "iteration")
        axis.plot(steps, values, color=color(number), ls=dash(number), lw=1, label=plain(name))


def _draw_by_member(axis: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A dash for each member; a color for each name or, if there is one name, for each member.

    The legend explains both.
    """
    members = sorted({row.get("member", 0) for row in rows})
    for i, member in enumerate(members):
        member_rows = [row for row in rows if row.get("member", 0) == member]
        for number, name in enumerate(names):
            steps, values = _column(member_rows, name, "t")
            which = i if len(names) == 1 else number
            axis.plot(steps, values, color=color(which), ls=dash(i), lw=1)
    if len(names) > 1:
        for number, name in enumerate(names):
            axis.plot([], [], color=color(number), lw=1, label=plain(name))
    for i, member in enumerate(members):
        line_color = color(i) if len(names) == 1 else "black"
        axis.plot([], [], color=line_color, ls=dash(i), lw=1, label=f"member {member + 1}")


def _column(
    rows: Sequence[Mapping[str, Any]], name: str, clock: str
) -> tuple[list[float], list[float]]:
    # + 1: the file counts from 0, so iteration 99 is the 100th optimizer step.
    points = [(row.get(clock, row.get("iteration")) + 1, row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _draw_episodes(
    axis: Axes,
    results: Results,
    evaluations: Sequence[Evaluation],
    metric: str,
    *,
    model: str,
    color: str,
) -> None:
    # The final evaluation is of the last average, so one of the two may be there or both.
    averages = {
        x.episode: x.metrics.get(metric, math.nan)
        for x in evaluations
        if x.stage in ("average", "final")
    }
    members = sorted({x.member for x in evaluations if x.member is not None})
    if averages:
        shape = "o" if model == "teacher" else "s"
        label = f"{model}, average" if len(members) > 1 else model
        episodes = [results.episode_number(episode) for episode in averages]
        axis.plot(episodes, list(averages.values()), color=color, marker=shape, label=label)
    for x in (x for x in evaluations if x.stage == "lawa"):
        axis.plot(
            [results.episode_number(x.episode)],
            [x.metrics.get(metric, math.nan)],
            color=color,
            ls="",
            marker="*",
            ms=12,
            label=f"{model}, LAWA",
        )
    for number, member in enumerate(members):
        of_member = [x for x in evaluations if x.member == member]
        axis.scatter(
            [results.episode_number(x.episode) for x in of_member],
            [x.metrics.get(metric, math.nan) for x in of_member],
            facecolors="none",
            edgecolors=color,
            marker=marker(number),
            label=f"{model}, member {member + 1}",
        )
