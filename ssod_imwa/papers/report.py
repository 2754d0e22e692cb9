"""A table of a paper as it is shown: the paper's numbers and ours side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ssod_imwa.papers.tables import Row, Table, TableError
from ssod_imwa.runs.groups import Spread
from ssod_imwa.runs.results import MODELS, Evaluation, Results
from ssod_imwa.visualization.table import spread_text

NOT_RUN = "not run"

ByRun = Mapping[tuple[str, int], Results]
"""Finished runs by name and seed."""


def shown_evaluation(row: Row, results: Results) -> Evaluation:
    """The evaluation of a run that a row shows.

    Raises:
        ResultsError: there is none of this model.
        TableError: there is none of this member, or of LAWA.
    """
    if row.member is None and not row.lawa:
        return results.headline(row.model)
    models = [row.model] if row.model else reversed(MODELS)
    wanted = ("lawa", None) if row.member is None else ("member", row.member - 1)
    for model in models:
        evaluations = [
            x for x in results.evaluations if (x.stage, x.member, x.model) == (*wanted, model)
        ]
        if evaluations:
            return evaluations[-1]
    if row.lawa:
        raise TableError(
            f"{row.label}: run {row.run} of seed {results.seed} holds no mean of its last averages "
            "(set IMWA.LAWA)"
        )
    raise TableError(
        f"{row.label}: run {row.run} of seed {results.seed} holds no evaluation of member "
        f"{row.member} of {results.imwa['members']} (members are evaluated with TEST.EVAL_MEMBERS "
        "True)"
    )


def report(table: Table, rows: Sequence[Row], runs: ByRun) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the paper's numbers and ours, mean ± standard deviation over seeds.

    A gain is the mean of the differences between runs of one seed ± their standard error, with the
    number of such pairs where it is not that of the row's seeds.

    Args:
        table: of the rows.
        rows: in order.
        runs: finished runs by name and seed; a row whose run is not among them has dashes, one of a
            method that is published alone has nothing and says so.

    Raises:
        UserError: see `shown_evaluation`.
    """
    printed = [m for m in table.metrics if any(m in row.paper for row in rows)]
    gains = any(row.against for row in rows)
    header = ["method"]
    for metric in table.metrics:
        header += [f"{metric}, paper", metric] if metric in printed else [metric]
        if gains and metric == table.metrics[0]:
            header.append(f"gain in {metric} ± s.e.")
    header += ["seeds", *(["source"] if printed else [])]
    by_label = {row.label: row for row in table.rows}
    cells = []
    for row in rows:
        ours = _by_seed(row, runs)
        line = [row.label]
        for metric in table.metrics:
            if metric in printed:
                line.append(_as_printed(row.paper.get(metric)))
            mean = spread_text(Spread.of(x.get(metric, math.nan) for x in ours.values()))
            line.append(mean if row.run else "")
            if gains and metric == table.metrics[0]:
                line.append(_gain(metric, ours, by_label.get(row.against or ""), runs))
        seeds = str(len(ours)) if row.run else NOT_RUN
        cells.append([*line, seeds, *([row.source] if printed else [])])
    return header, cells


def _by_seed(row: Row, runs: ByRun) -> dict[int, dict[str, float]]:
    return {
        seed: shown_evaluation(row, results).metrics
        for (name, seed), results in runs.items()
        if name == row.run
    }


def _gain(
    metric: str, ours: Mapping[int, Mapping[str, float]], other: Row | None, runs: ByRun
) -> str:
    """Mean and standard error of differences between runs of one seed; empty without a row."""
    if other is None:
        return ""
    theirs = _by_seed(other, runs)
    differences = Spread.of(
        ours[seed].get(metric, math.nan) - theirs[seed].get(metric, math.nan)
        for seed in ours.keys() & theirs.keys()
    )
    text = spread_text(replace(differences, std=differences.error), sign=True)
    is_whole = differences.count in (0, len(ours))
    return text if is_whole else f"{text} (n = {differences.count})"


def _as_printed(number: float | None) -> str:
    """One decimal, as most papers print percent, or two."""
    if number is None:
        return ""
    return f"{number:.1f}" if round(number, 1) == number else f"{number:.2f}"
