"""Tables of papers: which runs they need, in which order, and their numbers beside ours.

A table is a YAML file below `configs/tables`::

    title: CIFAR-10-LT, ratio 100
    metrics: [top1]                        # optional
    note: Rates were chosen on ...         # optional, stands under the title
    overrides: {TEST.EVAL_EPISODES: 0}       # optional, for all runs
    runs:
      stage1: {config: ../cifar10_lt/cross_entropy.yaml}
      crt: {config: ../cifar10_lt/crt.yaml, after: stage1, overrides: {SOLVER.BASE_LR: 0.05}}
      imwa: {config: [../cifar10_lt/cross_entropy.yaml, ../averaging/imwa.yaml]}
    rows:
      - {label: CE, run: stage1, paper: {top1: 71.1}, source: "MFW, Table 2"}
      - {label: cRT, run: crt, against: CE}
      - {label: CDT, paper: {top1: 79.4}, source: "MFW, Table 2"}

`config` is a recipe, or several files that are merged left to right. `after` starts a run from the
model of another. Several rows may show one run: its headline model,
its `model` "student" or "teacher", its `member` (from 1), or with `lawa: true` the mean of its last
averages, of which IMWA.LAWA says how many. `against` adds the gain over another
row, seed by seed. A row without a run is a method that is not here, with its published numbers.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssod_imwa.config.yaml_text import parse_yaml
from ssod_imwa.errors import UserError
from ssod_imwa.runs.results import MAIN_METRICS, MODELS, Model

METRICS = ("top1", "many", "medium", "few", "h_mean", "g_mean", "lowest_recall")
_OTHER_METRICS = ("top5", "mean_recall", "zero_recall_classes", "ece", "AP75", "APs", "APm", "APl")
_OF_A_CLASS = ("recall-", "AP-")


class TableError(UserError):
    """A table's file is missing or wrong, or a row cannot be shown."""


@dataclass(frozen=True)
class Run:
    """A training that a table needs.

    Attributes:
        name: in the table.
        config: YAML files, merged left to right.
        overrides: alternating keys and values, those of the table first.
        after: name of the run whose model this one starts from.
    """

    name: str
    config: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    after: str | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: its name.
        run: what it shows; None for a method that is published alone.
        paper: published numbers by metric.
        source: where they are published.
        model: "student" or "teacher"; None is the headline model.
        member: shows this member before it is averaged, from 1.
        lawa: shows the mean of the last averages.
        against: label of the row that the gain is over.
    """

    label: str
    run: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    model: Model | None = None
    member: int | None = None
    lawa: bool = False
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """A table's file, checked.

    Attributes:
        path: the file.
        title: what it is.
        metrics: columns.
        runs: by name, in the file's order.
        rows: at least one.
        note: what a reader of its numbers has to know, such as where rates were chosen.
    """

    path: Path
    title: str
    metrics: tuple[str, ...]
    runs: Mapping[str, Run]
    rows: tuple[Row, ...]
    note: str = ""


def read_table(path: str | Path) -> Table:
    """Read and check a table's file.

    Raises:
        TableError: the file cannot be read, a key is unknown or missing, a value is not allowed, a
            name leads nowhere, or runs wait for each other.
    """
    path = Path(path)
    tree = _load(path)
    other = ("metrics", "note", "overrides")
    _check_keys(tree, path, "", required=("title", "runs", "rows"), other=other)
    metrics = tuple(_typed(tree, "metrics", list, path, "") or METRICS)
    for metric in metrics:
        _check_metric(metric, path)
    common = _flat(_typed(tree, "overrides", dict, path, "") or {})
    runs = {
        str(name): _read_run(str(name), run, common, path)
        for name, run in _typed(tree, "runs", dict, path, "").items()
    }
    for run in runs.values():
        if run.after is not None:
            _check_name(run.after, runs, f"{path}: runs.{run.name}.after", "a run")
    rows = tuple(
        _read_row(row, i, runs, metrics, path)
        for i, row in enumerate(_typed(tree, "rows", list, path, ""))
    )
    note = _typed(tree, "note", str, path, "") or ""
    table = Table(path, str(tree["title"]), metrics, runs, rows, note)
    _check_rows(table)
    _in_order(table, runs)
    return table


def choose_rows(table: Table, labels: Sequence[str] | None) -> list[Row]:
    """The rows with these labels in the table's order; None chooses all.

    Raises:
        TableError: there is no such row.
    """
    known = [row.label for row in table.rows]
    for label in labels or ():
        _check_name(label, known, f"{table.path}: --rows", "a row")
    return [row for row in table.rows if labels is None or row.label in labels]


def needed_runs(table: Table, rows: Iterable[Row]) -> list[Run]:
    """The runs that rows show and those they start from, each once, in an order to train in."""
    return _in_order(table, [row.run for row in rows if row.run is not None])


def shown_runs(table: Table, rows: Iterable[Row]) -> list[Run]:
    """The runs whose numbers are in these rows, their gains' other rows included."""
    by_label = {row.label: row for row in table.rows}
    names = []
    for row in rows:
        names += [row.run, *([by_label[row.against].run] if row.against else [])]
    return [table.runs[name] for name in dict.fromkeys(names) if name is not None]


def _in_order(table: Table, names: Iterable[str]) -> list[Run]:
    """These runs and all that come before them, each after the one it starts from."""
    ordered: dict[str, Run] = {}

    def add(name: str, waiting: tuple[str, ...]) -> None:
        if name in waiting:
            circle = " -> ".join((*waiting[waiting.index(name) :], name))
            raise TableError(f"{table.path}: runs wait for each other by `after`: {circle}")
        run = table.runs[name]
        if run.after is not None:
            add(run.after, (*waiting, name))
        ordered.setdefault(name, run)

    for name in names:
        add(name, ())
    return list(ordered.values())


def _load(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path), TableError)
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: is not a text file") from error
    if not isinstance(tree, dict):
        raise TableError(f"{path}: must hold title, runs and rows, not a {type(tree).__name__}")
    return tree


def _read_run(name: str, tree: Any, common: tuple[str, ...], path: Path) -> Run:
    where = f"runs.{name}"
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise TableError(f"{path}: {where}: {name!r} is not allowed (a run's name is a folder's)")
    _check_keys(tree, path, where, required=("config",), other=("overrides", "after"))
    names = tree["config"] if isinstance(tree["config"], list) else [tree["config"]]
    config = tuple(path.parent / str(file) for file in names)
    if not config:
        raise TableError(f"{path}: {where}.config = [] is not allowed (must be at least one file)")
    for file in config:
        if not os.path.isfile(file):
            raise TableError(f"{path}: {where}.config: {file} does not exist")
    overrides = _flat(_typed(tree, "overrides", dict, path, where) or {})
    return Run(name, config, common + overrides, _typed(tree, "after", str, path, where))


def _read_row(
    tree: Any, i: int, runs: Mapping[str, Run], metrics: Sequence[str], path: Path
) -> Row:
    where = f"rows[{i}]"
    other = ("run", "paper", "source", "model", "member", "lawa", "against")
    _check_keys(tree, path, where, required=("label",), other=other)
    row = Row(
        label=str(tree["label"]),
        run=_typed(tree, "run", str, path, where),
        paper=_typed(tree, "paper", dict, path, where) or {},
        source=_typed(tree, "source", str, path, where) or "",
        model=_typed(tree, "model", str, path, where),
        member=_typed(tree, "member", int, path, where),
        lawa=_typed(tree, "lawa", bool, path, where) or False,
        against=_typed(tree, "against", str, path, where),
    )
    if row.run is not None:
        _check_name(row.run, runs, f"{path}: {where}.run", "a run")
    elif not row.paper or row.model or row.member is not None or row.lawa or row.against:
        raise TableError(
            f"{path}: {where} has no run (it may have label, paper and source, and needs all three)"
        )
    if row.model is not None:
        _check_name(row.model, MODELS, f"{path}: {where}.model", "a model")
    if row.member is not None and row.member < 1:
        raise TableError(f"{path}: {where}.member = {row.member} is not allowed (counted from 1)")
    if row.lawa and row.member is not None:
        raise TableError(f"{path}: {where} has a member and lawa (it shows one of them)")
    for metric, number in row.paper.items():
        _check_name(metric, metrics, f"{path}: {where}.paper", "one of the table's metrics")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TableError(
                f"{path}: {where}.paper.{metric} = {number!r} is not allowed (must be a number)"
            )
    if row.paper and not row.source:
        raise TableError(f"{path}: {where} has numbers of a paper but no source")
    return row


def _check_rows(table: Table) -> None:
    if not table.rows:
        raise TableError(f"{table.path}: rows = [] is not allowed (must be at least one)")
    labels = [row.label for row in table.rows]
    for i, row in enumerate(table.rows):
        if row.label in labels[:i]:
            raise TableError(f"{table.path}: rows[{i}].label: {row.label!r} stands twice")
        if row.against is not None:
            with_run = [other.label for other in table.rows if other.run is not None]
            place = f"{table.path}: rows[{i}].against"
            _check_name(row.against, with_run, place, "a row with a run")


def _check_keys(
    tree: Any, path: Path, where: str, *, required: Sequence[str], other: Sequence[str]
) -> None:
    if not isinstance(tree, dict):
        raise TableError(f"{path}: {where} must hold keys and values, not {tree!r}")
    prefix = f"{where}." if where else ""
    for key in tree:
        _check_name(str(key), (*required, *other), f"{path}: {prefix}{key}", "a key of a table")
    for key in required:
        if tree.get(key) is None:
            raise TableError(f"{path}: {prefix}{key} is missing")


def _typed(tree: Mapping[str, Any], key: str, kind: type, path: Path, where: str) -> Any:
    """The value of a key, or None if it is not there."""
    value = tree.get(key)
    is_kind = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if value is not None and not is_kind:
        names = {dict: "keys and values", list: "a list", str: "a text", int: "an integer"}
        names[bool] = "true or false"
        name = f"{where}.{key}" if where else key
        raise TableError(f"{path}: {name} = {value!r} is not allowed (must be {names[kind]})")
    return value


def _check_name(name: str, known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f" (there are {', '.join(known)})"
        raise TableError(f"{where}: {name!r} is not {what}{hint}")


def _check_metric(name: Any, path: Path) -> None:
    # Those of experts and of several test sets have a prefix: "expert1/top1".
    base = str(name).rpartition("/")[2]
    if not base.startswith(_OF_A_CLASS):
        _check_name(base, (*MAIN_METRICS, *_OTHER_METRICS), f"{path}: metrics", "a metric")


def _flat(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """KEY VALUE pairs as a command line has them."""
    pairs = ((str(k), v if isinstance(v, str) else repr(v)) for k, v in overrides.items())
    return tuple(text for pair in pairs for text in pair)
