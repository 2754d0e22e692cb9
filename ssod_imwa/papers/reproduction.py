"""Trains and reports a table of a paper: the runs' configurations, and the numbers side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

from ssod_imwa.config import load_config
from ssod_imwa.config.reader import keys, parse_config
from ssod_imwa.engine.checkpoint.atomic import write_text
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.errors import ConfigError
from ssod_imwa.papers.tables import Row, Run, Table, TableError
from ssod_imwa.runs.results import FILE_NAME, MODELS, Evaluation, Results, Spread, read_results
from ssod_imwa.runs.run import FREE_KEYS
from ssod_imwa.visualization.table import spread_text

RECIPE = "recipe.yaml"  # in a run's folder: its configuration before it was scaled

Found = Mapping[tuple[str, int], Results]


def run_config(
    table: Table,
    run: Run,
    *,
    seed: int,
    output: Path,
    initial: Path | None = None,
    overrides: Sequence[str] = (),
) -> CfgNode:
    """The configuration of a run, as long as its recipe says.

    Args:
        table: of the run.
        run: one of the table's.
        seed: of the run.
        output: its folder.
        initial: folder of the run that it starts from.
        overrides: KEY VALUE pairs that come last.

    Raises:
        ConfigError: its file or an override is wrong.
    """
    own = ["SEED", str(seed), "OUTPUT_DIR", str(output)]
    if initial is not None:
        own += ["MODEL.WEIGHTS", str(initial)]
    try:
        load_config(run.config, [*run.overrides, *own])
    except ConfigError as error:
        raise ConfigError(f"{table.path}: runs.{run.name}: {error}") from error
    return load_config(run.config, [*run.overrides, *own, *overrides])


def scaled(cfg: CfgNode, factor: float) -> CfgNode:
    """A copy that trains `factor` times as long, with the same number of episodes if they fit.

    Args:
        cfg: counted in iterations, as a task has it: CLS.SCHEDULE.EPOCHS is 0.
        factor: above 0. Nothing becomes shorter than one iteration an episode.

    Raises:
        ValueError: the configuration counts epochs, or the factor is not positive.

    Example:
        >>> cfg = scaled(load_config(overrides=["SOLVER.MAX_ITER", "200"]), 0.05)
        >>> cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
        (10, 50)
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor = {factor} is not allowed (must be above 0)")
    if cfg.CLS.SCHEDULE.EPOCHS:
        raise ValueError(
            f"CLS.SCHEDULE.EPOCHS = {cfg.CLS.SCHEDULE.EPOCHS} is not allowed (must be 0: give the "
            "configuration of a task)"
        )
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.MAX_ITER = max(1, round(factor * solver.MAX_ITER))
    # Steps that fall on one iteration are one step.
    solver.STEPS = sorted({round(factor * step) for step in solver.STEPS})
    solver.WARMUP_ITERS = round(factor * solver.WARMUP_ITERS)
    cfg.SSOD.BURN_IN_ITERS = round(factor * cfg.SSOD.BURN_IN_ITERS)
    cfg.IMWA.EPISODES = min(cfg.IMWA.EPISODES, solver.MAX_ITER)
    cfg.freeze()
    return cfg


def finished(folder: Path) -> Results | None:
    """The results of a run of a table, or None before its end."""
    if not all((folder / name).is_file() for name in (RECIPE, FINAL, FILE_NAME)):
        return None
    results = read_results(folder)
    return results if any(x.stage == "final" for x in results.evaluations) else None


def write_recipe(cfg: CfgNode) -> None:
    """Keep a run's configuration in its folder, for `check_recipe`."""
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE, cfg.dump(), kind="recipe")


def check_recipe(cfg: CfgNode) -> None:
    """Refuse a folder with a run of another configuration.

    The trainer has a check of its own when it resumes, but not for finished runs, and after scaling
    two schedules may look the same.

    Raises:
        TableError: a key that changes the run is not what it was.
    """
    path = Path(cfg.OUTPUT_DIR) / RECIPE
    if not path.exists():
        return
    before = parse_config(path.read_text(encoding="utf-8"), str(path))
    for key in keys(cfg):
        old, new = _value(before, key), _value(cfg, key)
        if old != new and key not in FREE_KEYS:
            raise TableError(
                f"{path.parent} has a run with {key} = {old!r}, which is now {new!r} (remove it, "
                "or choose another --output)"
            )


def _value(cfg: CfgNode, key: str) -> object:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def shown(row: Row, results: Results) -> Evaluation:
    """The evaluation of a run that a row shows.

    Raises:
        ResultsError: there is none of this model.
        TableError: there is none of this member.
    """
    if row.member is None:
        return results.headline(row.model)
    models = [row.model] if row.model else reversed(MODELS)
    for model in models:
        found = [
            x
            for x in results.evaluations
            if (x.stage, x.member, x.model) == ("member", row.member - 1, model)
        ]
        if found:
            return found[-1]
    raise TableError(
        f"{row.label}: run {row.run} of seed {results.seed} holds no evaluation of member "
        f"{row.member} of {results.imwa['members']} (members are evaluated with TEST.EVAL_MEMBERS "
        "True)"
    )


def report(table: Table, rows: Sequence[Row], found: Found) -> tuple[list[str], list[list[str]]]:
    """Header and cells: the paper's numbers and ours, mean ± standard deviation over seeds.

    Args:
        table: of the rows.
        rows: in order.
        found: finished runs by name and seed; a row without any has dashes.

    Raises:
        UserError: see `shown`.
    """
    printed = [m for m in table.metrics if any(m in row.paper for row in rows)]
    gains = any(row.against for row in rows)
    header = ["method"]
    for metric in table.metrics:
        header += [f"{metric}, paper", metric] if metric in printed else [metric]
        if gains and metric == table.metrics[0]:
            header.append(f"gain in {metric}")
    header += ["seeds", *(["source"] if printed else [])]
    by_label = {row.label: row for row in table.rows}
    cells = []
    for row in rows:
        ours = _by_seed(row, found)
        line = [row.label]
        for metric in table.metrics:
            if metric in printed:
                line.append(_as_printed(row.paper.get(metric)))
            line.append(spread_text(Spread.of(x.get(metric, math.nan) for x in ours.values())))
            if gains and metric == table.metrics[0]:
                line.append(_gain(metric, ours, by_label.get(row.against or ""), found))
        cells.append([*line, str(len(ours)), *([row.source] if printed else [])])
    return header, cells


def _by_seed(row: Row, found: Found) -> dict[int, dict[str, float]]:
    return {
        seed: shown(row, results).metrics
        for (name, seed), results in found.items()
        if name == row.run
    }


def _gain(
    metric: str, ours: Mapping[int, Mapping[str, float]], other: Row | None, found: Found
) -> str:
    """Mean and spread of the differences between runs of one seed; empty without another row."""
    if other is None:
        return ""
    theirs = _by_seed(other, found)
    differences = (
        ours[seed].get(metric, math.nan) - theirs[seed].get(metric, math.nan)
        for seed in ours.keys() & theirs.keys()
    )
    return spread_text(Spread.of(differences), sign=True)


def _as_printed(number: float | None) -> str:
    """One decimal, as most papers print percent, or two."""
    if number is None:
        return ""
    return f"{number:.1f}" if round(number, 1) == number else f"{number:.2f}"
