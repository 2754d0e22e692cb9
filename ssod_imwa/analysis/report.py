"""What finished runs did, as sections of a page: everything that their folders tell by themselves.

Pictures that need models and data are `report_pictures`'.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from ssod_imwa.runs.advice import advice_lines, numbers_in
from ssod_imwa.runs.burn_in import burn_in_of
from ssod_imwa.runs.comparison import folder_names, folder_of
from ssod_imwa.runs.gains import Gain, average_gains
from ssod_imwa.runs.groups import group_runs
from ssod_imwa.runs.results import MODELS, Evaluation, Results, main_metrics, read_results
from ssod_imwa.runs.run import CONFIG_FILE, read_settings
from ssod_imwa.visualization.advice_plots import advice_figure
from ssod_imwa.visualization.label_plots import has_labels, labels_figure
from ssod_imwa.visualization.page import Page
from ssod_imwa.visualization.plots import (
    course_figure,
    episodes_figure,
    read_metrics,
    training_figure,
)
from ssod_imwa.visualization.style import color, dash, finish, marker, panels, plain
from ssod_imwa.visualization.table import comparison_rows, percent

# Of a class's own figure, by task: name before the class, what it is.
CLASS_FIGURES = {"detection": ("AP-", "AP"), "classification": ("recall-", "recall")}
DISTANCE = "imwa/distance-"


@dataclass(frozen=True)
class Run:
    """A run that has ended, or at least was evaluated.

    Attributes:
        name: of its folder.
        folder: with everything it wrote.
        results: its figures.
        rows: of metrics.json.
        settings: values by key, None if config.yaml is not there.
    """

    name: str
    folder: Path
    results: Results
    rows: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] | None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs from their folders, each once.

    Raises:
        UserError: one has no results, or a file of it is damaged.
    """
    unique = list(dict.fromkeys(folder_of(folder) for folder in folders))
    return [
        Run(
            name,
            folder,
            read_results(folder),
            read_metrics(folder / "metrics.json"),
            read_settings(folder),
        )
        for name, folder in zip(folder_names(unique), unique, strict=True)
    ]


def add_overview(page: Page, runs: Sequence[Run]) -> None:
    """Final figures, and what the runs do differently."""
    page.section("Results")
    groups = group_runs(
        [run.results for run in runs],
        names=[run.name for run in runs],
        settings=[None if run.settings is None else dict(run.settings) for run in runs],
    )
    header, rows = comparison_rows(groups)
    page.table(
        header,
        rows,
        caption="Final figures (%) of the averaged model that is shipped, mean ± standard "
        "deviation over seeds where a row has several runs.",
    )
    metric = next(iter(main_metrics([runs[0].results])), None)
    courses = [] if metric is None else [_course(run.results, metric) for run in runs]
    # A figure of final points alone says less than the table, and magnifies what sets them apart.
    if len(runs) > 1 and any(len(points) > 1 for points in courses):
        page.figure(
            _overlay([run.name for run in runs], courses, f"{metric} (%)"),
            words=f"{metric} (%) of the shipped model over a member's own iterations, a line for "
            "each run; averages of members where there are several.",
        )
    if differences := _differences(runs):
        page.table(
            ["key", *(run.name for run in runs)],
            differences,
            caption="Settings that are not the same in all runs.",
        )
    elif len(runs) > 1:
        page.text("All settings are the same.")


def add_run(page: Page, run: Run) -> None:
    """The course of one run: figures, averages, labels, classes, resources, command."""
    results = run.results
    page.section(run.name)
    first = results.common_iterations
    common = f", the first {first} of them in common" if first else ""
    page.text(
        f"{results.method} on {results.dataset}; M = {results.imwa['members']} members, "
        f"E = {results.imwa['episodes']} episodes, T = {results.iterations} iterations of each "
        f"member{common}, seed {results.seed}."
    )
    _add_course(page, run)
    _add_averaging(page, run)
    _add_labels(page, run)
    _add_classes(page, run)
    _add_resources(page, run)


def _add_course(page: Page, run: Run) -> None:
    page.heading("Course")
    burn_in = burn_in_of(run.results)
    if main_metrics([run.results]):
        if any(x.stage == "running" for x in run.results.evaluations):
            page.figure(
                course_figure(run.results, burn_in=burn_in),
                words="Figures (%) over a member's own iterations: lines are members, markers "
                "averages.",
            )
        if any(x.episode > 0 or x.stage == "member" for x in run.results.evaluations):
            page.figure(
                episodes_figure(run.results, burn_in=burn_in),
                words="Figures (%) after each episode: open markers are members before averaging, "
                "lines averages.",
            )
    page.figure(
        training_figure(run.rows, burn_in=burn_in),
        words="Losses, learning rate and pseudo-labels of training.",
    )


def _add_averaging(page: Page, run: Run) -> None:
    metric = next(iter(main_metrics([run.results])), "")
    gains = average_gains(run.results.evaluations, metric)
    distances = [row for row in run.rows if any(name.startswith(DISTANCE) for name in row)]
    numbers = numbers_in(run.rows)
    if not gains and not distances and not numbers:
        return
    page.heading("What averaging did")
    if numbers:
        *_, last = advice_lines(run.rows).values()
        page.text(f"After the last average: {last}.")
        page.figure(
            advice_figure({run.results.episode_number(e): x for e, x in numbers.items()}),
            words="Loss of members and averages on training images, what averaging took from it, "
            "and how far members were apart.",
        )
    if distances:
        page.figure(
            _distances_figure(run.results, distances),
            words="Distance of the last member from the average, relative to the average's length.",
        )
    if gains:
        page.figure(
            _gains_figure(run.results, metric, gains),
            words=f"Gain in {metric} (points) of each average over the mean of its members.",
        )
        rows = []
        for x in gains:
            figures = [percent(value) for value in (x.members, x.best, x.average)]
            more = [percent(x.average - value, sign=True) for value in (x.members, x.best)]
            number = str(run.results.episode_number(x.episode))
            rows.append([number, x.model, *figures, *more])
        header = ["episode", "model", "mean of members", "best member", "average"]
        header += ["gain over mean", "gain over best"]
        page.table(header, rows, caption=f"{metric} (%) before and after each average.")


def _add_labels(page: Page, run: Run) -> None:
    if has_labels(run.rows):
        page.heading("What the teacher taught")
        page.figure(
            labels_figure(run.rows, run.results.class_counts),
            words="Number of pseudo-labels an image; how many are true and how many objects have "
            "one, where the split took labels away that are known; shares of classes and scores.",
        )


def _add_classes(page: Page, run: Run) -> None:
    prefix, what = CLASS_FIGURES[run.results.task]
    final = _headline(run.results)
    by_set = {} if final is None else _class_figures(final, prefix)
    if not by_set:
        return
    counts = run.results.class_counts
    page.heading("Classes")
    for dataset, figures in by_set.items():
        on = f"on {dataset or 'the test images'}"
        if counts:
            page.figure(
                _classes_figure(figures, counts, what),
                words=f"{what} (%) of each class {on}, against its labeled objects in training.",
            )
        rows = [[name, str(counts.get(name, "–")), percent(x)] for name, x in figures.items()]
        header = ["class", "labeled in training", f"{what} (%)"]
        page.table(header, rows, caption=f"Of the shipped model, {on}.")


def _class_figures(evaluation: Evaluation, prefix: str) -> dict[str, dict[str, float]]:
    """Figures by class for each test set, whose name is "" if it is the only one.

    Of several, "SET/" is before the names of all metrics, see `evaluate_sets`.
    """
    by_set: dict[str, dict[str, float]] = {}
    for name, value in evaluation.metrics.items():
        # The first one counts: a class may be called a/AP-b.
        before, found, class_name = f"/{name}".partition(f"/{prefix}")
        if found:
            by_set.setdefault(before[1:], {})[class_name] = value
    return by_set


def _add_resources(page: Page, run: Run) -> None:
    results = run.results
    page.heading("Resources and command")
    rows = [
        ["optimizer steps of all members", f"{results.global_steps:,}"],
        ["wall time, interruptions left out", str(timedelta(seconds=round(results.wall_time)))],
        ["peak memory", f"{results.peak_memory / 2**30:.2f} GiB"],
        *([name, version] for name, version in results.versions.items()),
    ]
    page.table(["what", "value"], rows, caption="Of the whole run.")
    if (run.folder / CONFIG_FILE).exists():
        page.text("The same run again, from its complete configuration:")
        config = shlex.quote(str(run.folder / CONFIG_FILE))
        page.code(f"python tools/train_net.py --config-file {config} OUTPUT_DIR output/again")


def _gains_figure(results: Results, metric: str, gains: Sequence[Gain]) -> Figure:
    points: dict[str, list[tuple[int, float]]] = {
        model: [
            (results.episode_number(x.episode), x.average - x.members)
            for x in gains
            if x.model == model
        ]
        for model in MODELS
    }
    figure = _episodes_figure(points, f"gain in {metric} (points)")
    figure.axes[0].axhline(0, color="black", lw=0.8)
    return figure


def _distances_figure(results: Results, rows: Sequence[Mapping[str, Any]]) -> Figure:
    points: dict[str, list[tuple[int, float]]] = {
        model: [
            (results.episode_number(row["episode"]), row[DISTANCE + model])
            for row in rows
            if DISTANCE + model in row
        ]
        for model in MODELS
    }
    return _episodes_figure(points, "relative distance")


def _episodes_figure(points: Mapping[str, Sequence[tuple[int, float]]], what: str) -> Figure:
    """A line for each model over episodes, which are counted from 1."""
    figure, ((axis,),) = panels(1, 1, width=7)
    for number, (model, line) in enumerate(points.items()):
        if line:
            episodes, values = zip(*line, strict=True)
            axis.plot(episodes, values, color=color(number), marker=marker(number), label=model)
    finish(axis, x="episode", y=what)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _classes_figure(figures: Mapping[str, float], counts: Mapping[str, int], what: str) -> Figure:
    figure, ((axis,),) = panels(1, 1, width=7)
    names = [name for name in figures if counts.get(name)]
    x, y = [counts[name] for name in names], [figures[name] for name in names]
    axis.plot(x, y, ls="", color=color(0), marker="o")
    if len(names) <= 30:
        for name, place in zip(map(plain, names), zip(x, y, strict=True), strict=True):
            axis.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize="small")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(0, 100)
    finish(axis, x="labeled objects in training", y=f"{what} (%)", legend=None)
    return figure


def _course(results: Results, metric: str) -> list[tuple[int, float]]:
    """The shipped model's figure after each number of a member's own iterations."""
    final = _headline(results)
    series = [] if final is None else results.series(final.model)
    return [(x.t + 1, x.metrics.get(metric, math.nan)) for x in series if x.t is not None]


def _overlay(
    names: Sequence[str], courses: Sequence[Sequence[tuple[int, float]]], what: str
) -> Figure:
    figure, ((axis,),) = panels(1, 1, width=8, height=4)
    for number, (name, points) in enumerate(zip(map(plain, names), courses, strict=True)):
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=color(number), ls=dash(number), marker=marker(number), label=name)
    finish(axis, x="own iteration t (optimizer steps of one member)", y=what)
    return figure


def _headline(results: Results) -> Evaluation | None:
    return results.headline() if results.averages else None


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Keys whose values are not the same in all runs, with the value of each."""
    settings = [run.settings or {} for run in runs]
    members = [{f"IMWA.{k.upper()}": v for k, v in run.results.imwa.items()} for run in runs]
    folds = ["–" if run.results.fold is None else run.results.fold for run in runs]
    merged = [
        {**of_run, **imwa, "SEED": run.results.seed, "DATASETS.SPLIT.FOLD": fold}
        for of_run, imwa, run, fold in zip(settings, members, runs, folds, strict=True)
    ]
    keys = sorted({key for of_run in merged for key in of_run})
    rows = []
    for key in keys:
        values = [str(of_run.get(key, "–")) for of_run in merged]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return rows
