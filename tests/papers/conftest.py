"""A table and results of runs, made in a line each."""

import math
from pathlib import Path

import pytest

from ssod_imwa.papers.tables import Table
from ssod_imwa.runs.results import Evaluation, Results


def _table_of(*rows, metrics=("top1", "few"), runs=()):
    return Table(Path("t.yaml"), "T", metrics, {run.name: run for run in runs}, rows)


def _results_of(seed, top1, *, teacher=None, members=(), stage="final", few=math.nan):
    evaluations = [
        Evaluation("student", "member", 0, m, {"top1": value}) for m, value in enumerate(members)
    ]
    evaluations.append(Evaluation("student", stage, 0, None, {"top1": top1, "few": few}))
    if teacher is not None:
        evaluations.append(Evaluation("teacher", stage, 0, None, {"top1": teacher}))
    return Results(
        task="classification",
        dataset="d",
        method="m",
        imwa={"members": max(1, len(members)), "episodes": 1},
        seed=seed,
        iterations=1,
        wall_time=1.0,
        peak_memory=1,
        evaluations=tuple(evaluations),
    )


@pytest.fixture
def table_of():
    return _table_of


@pytest.fixture
def results_of():
    return _results_of
