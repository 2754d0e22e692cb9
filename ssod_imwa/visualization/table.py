"""Results as tables, for the terminal and for Markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.table import Table

from ssod_imwa.runs.groups import CHANGES_NO_AVERAGE, Group, Spread
from ssod_imwa.runs.results import (
    LAST_EVALUATIONS,
    MODELS,
    Evaluation,
    Model,
    Results,
    main_metrics,
)

_MODEL_NAMES = {"student": "student", "teacher": "teacher (EMA)"}


def results_table(results: Results, *, metrics: Sequence[str] | None = None) -> Table:
    """One row per episode and member or average, the figures of student and teacher in columns.

    Episodes and members are counted from 1, as in the log; episode 0 is the part that members have
    in common. Evaluations inside episodes are summed
    up in three rows at the end.

    Args:
        results: of one run.
        metrics: which figures, in percent; None takes every AP and AP50.
    """
    metrics = main_metrics([results]) if metrics is None else metrics
    models = [name for name in MODELS if any(x.model == name for x in results.evaluations)]
    table = Table(
        title=f"{results.method} on {results.dataset}, {_imwa(results)}, seed {results.seed}"
    )
    table.add_column("episode", justify="right")
    table.add_column("weights")
    for model in models:
        for metric in metrics:
            table.add_column(f"{_MODEL_NAMES[model]}\n{metric}", justify="right")
    rows: dict[tuple[int, str], dict[str, Evaluation]] = {}
    for item in results.evaluations:
        if item.stage == "running":
            continue
        weights = _weights(item, of_one=results.is_of_one(item))
        rows.setdefault((item.episode, weights), {})[item.model] = item
    last = None
    for (episode, weights), evaluations in rows.items():
        cells = [
            percent(evaluations[model].metrics.get(metric, math.nan))
            if model in evaluations
            else ""
            for model in models
            for metric in metrics
        ]
        if last is not None and last != episode:
            table.add_section()
        table.add_row(
            "" if last == episode else str(results.episode_number(episode)),
            weights,
            *cells,
            style=None if weights.startswith("member") else "bold",
        )
        last = episode
    if any(x.stage == "running" for x in results.evaluations):
        _add_summary(table, results, models, metrics)
    return table


def _add_summary(
    table: Table, results: Results, models: Sequence[Model], metrics: Sequence[str]
) -> None:
    """The best of all evaluations, and median and mean of the last."""
    summary = results.summary()
    table.add_section()
    for key in ("best", f"median_of_last_{LAST_EVALUATIONS}", f"mean_of_last_{LAST_EVALUATIONS}"):
        cells = [
            percent(summary.get(model, {}).get(metric, {}).get(key, math.nan))
            for model in models
            for metric in metrics
        ]
        table.add_row("", key.replace("_", " "), *cells)


def comparison_rows(
    groups: Sequence[Group],
    *,
    metrics: Sequence[str] | None = None,
    model: Model | None = None,
    baseline: Group | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a comparison: a row per group, mean ± standard deviation over its runs.

    If rows would be called the same, a first column has the names of their folders.

    Args:
        groups: in the order of the rows.
        metrics: which figures, in percent; None takes every AP and AP50.
        model: whose; None takes the teacher where there is one.
        baseline: adds, for each figure, the mean ± standard deviation of the difference to this
            group, run by run of equal seed.
    """
    if metrics is None:
        metrics = main_metrics(run for group in groups for run in group.runs)
    header = ["data", "method", "IMWA", "T", "model", "runs", "seeds"]
    for metric in metrics:
        header += [metric] if baseline is None else [metric, f"gain in {metric}"]
    rows = []
    for group in groups:
        run = group.runs[0]
        row = [run.dataset, run.method, _imwa(run, among=groups), str(run.iterations)]
        row += [run.headline(model).model, str(len(group.runs)), _draws(group)]
        for metric in metrics:
            row.append(spread_text(group.spread(metric, model=model)))
            if baseline is not None:
                gain = group.gain(metric, baseline, model=model)
                comparable = group is not baseline and group.dataset == baseline.dataset
                row.append(spread_text(gain, sign=True) if comparable else "")
        rows.append(row)
    if len({tuple(row[:5]) for row in rows}) < len(rows) and all(group.names for group in groups):
        header.insert(0, "folder")
        rows = [[_pattern(group.names), *row] for group, row in zip(groups, rows, strict=True)]
    return header, rows


def comparison_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The rows of `comparison_rows` for the terminal; only words may be wrapped."""
    table = Table()
    for name, cells in zip(header, zip(*rows, strict=True), strict=True):
        is_text = name in ("folder", "data", "method", "IMWA")
        width = 0 if is_text else max(map(len, cells))
        table.add_column(name, justify="left" if is_text else "right", min_width=width)
    for row in rows:
        table.add_row(*row)
    return table


def comparison_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows of `comparison_rows` as a Markdown table.

    Example:
        >>> print(comparison_markdown(["data", "AP"], [["voc", "54.1"]]))
        | data | AP |
        |---|---|
        | voc | 54.1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    text = ["| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines]
    text[1] = "|" + "---|" * len(header)
    return "\n".join(text)


def percent(value: float, *, sign: bool = False) -> str:
    """Two decimals, as papers print AP; a dash for NaN.

    Example:
        >>> percent(12.345), percent(1.5, sign=True), percent(float("nan"))
        ('12.35', '+1.50', '–')
    """
    if math.isnan(value):
        return "–"
    return f"{value:+.2f}" if sign else f"{value:.2f}"


def spread_text(spread: Spread, *, sign: bool = False) -> str:
    """Mean ± standard deviation; the mean alone if there is one run.

    Example:
        >>> spread_text(Spread.of([1.0, 2.0])), spread_text(Spread.of([1.0]))
        ('1.50 ± 0.71', '1.00')
    """
    mean = percent(spread.mean, sign=sign)
    return mean if math.isnan(spread.std) else f"{mean} ± {spread.std:.2f}"


def _weights(item: Evaluation, *, of_one: bool) -> str:
    if item.member is not None:
        return f"member {item.member + 1}"
    # One member is plain training: nothing was averaged.
    return "episode's end" if item.stage == "average" and of_one else item.stage


def _draws(group: Group) -> str:
    """The seeds, and the folds if there are several."""
    text = ", ".join(map(str, group.seeds))
    folds = sorted({run.fold for run in group.runs if run.fold is not None})
    return f"{text} (folds {', '.join(map(str, folds))})" if len(folds) > 1 else text


def _pattern(names: Sequence[str]) -> str:
    """Names in one: `*` stands for what differs; a list if they have nothing in common.

    Example:
        >>> _pattern(["seed1_imwa", "seed2_imwa"]), _pattern(["a", "b"]), _pattern(["a"])
        ('seed*_imwa', 'a, b', 'a')
    """
    if len(names) == 1:
        return names[0]
    start = _common_start(names)
    backwards = [name[len(start) :][::-1] for name in names]
    end = _common_start(backwards)[::-1]
    return f"{start}*{end}" if start or end else ", ".join(names)


def _common_start(names: Sequence[str]) -> str:
    columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in columns)


def _imwa(run: Results, *, among: Sequence[Group] = ()) -> str:
    """The settings in short: what they do, then what differs among the runs shown."""
    members, episodes = run.imwa["members"], run.imwa["episodes"]
    if not _is_averaged(run):
        return "no averaging"
    start = run.imwa.get("start", 0.0)
    text = f"M = {members}, E = {episodes}" + (f", START = {start:g}" if start else "")
    hidden = {"members", "episodes", "start", *CHANGES_NO_AVERAGE}
    among = [group for group in among if _is_averaged(group.runs[0])]
    for key in sorted({key for group in among for key in group.imwa} - hidden):
        if len({str(group.imwa.get(key)) for group in among}) > 1:
            text += f", {key} = {run.imwa.get(key)}"
    return text


def _is_averaged(run: Results) -> bool:
    """Whether there is something to say of how it is averaged."""
    return run.members > 1 or run.takes_outer_steps
