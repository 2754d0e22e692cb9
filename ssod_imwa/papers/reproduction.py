"""Trains the runs of a paper's table: their configurations, folders and results."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.config.averaging import most_episodes
from ssod_imwa.config.reader import keys, value_of
from ssod_imwa.engine.checkpoint.atomic import write_output
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.errors import ConfigError
from ssod_imwa.papers.tables import (
    Row,
    Run,
    Table,
    TableError,
    needed_runs,
    shown_runs,
)
from ssod_imwa.runs.config import FREE_KEYS, ITERATION_KEYS, load_config, parse_config
from ssod_imwa.runs.generations import generation_count
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import FILE_NAME, Results, read_results
from ssod_imwa.runs.run import train

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"  # in a run's folder: its configuration before it was scaled


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
    place = ["SEED", str(seed), "OUTPUT_DIR", str(output)]
    if initial is not None:
        place += ["MODEL.WEIGHTS", str(initial)]
    if taken := set(place[::2]) & set(overrides[::2]):
        raise ConfigError(
            f"{min(taken)} is not allowed here (each run of a table has its own: --seeds, --output)"
        )
    try:
        load_config(run.config, [*run.overrides, *place])
    except ConfigError as error:
        raise ConfigError(f"{table.path}: runs.{run.name}: {error}") from error
    return load_config(run.config, [*run.overrides, *place, *overrides])


def scaled(cfg: CfgNode, factor: float) -> CfgNode:
    """A copy that trains `factor` times as long, with the same number of episodes if they fit.

    Args:
        cfg: of a task (`Task.cfg`), whose schedule is counted in iterations.
        factor: above 0. Nothing becomes shorter than one iteration an episode; CReST's generations
            stay equally long.

    Raises:
        ValueError: the factor is not positive.

    Example:
        >>> cfg = scaled(load_config(overrides=["SOLVER.MAX_ITER", "200"]), 0.05)
        >>> cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
        (10, 50)
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor = {factor} is not allowed (must be above 0)")
    cfg = cfg.clone()
    cfg.defrost()
    for key in set(keys(cfg)) & ITERATION_KEYS:
        group, _, leaf = key.rpartition(".")
        node = value_of(cfg, group)
        node[leaf] = _scaled(node[leaf], factor)
    generations = generation_count(cfg)
    cfg.SOLVER.MAX_ITER = max(1, round(cfg.SOLVER.MAX_ITER / generations)) * generations
    cfg.IMWA.MEMBER_OVERRIDES = [
        {key: _scaled(x, factor) if key in ITERATION_KEYS else x for key, x in block.items()}
        for block in cfg.IMWA.MEMBER_OVERRIDES
    ]
    cfg.IMWA.EPISODES = min(cfg.IMWA.EPISODES, most_episodes(cfg, cfg.SOLVER.MAX_ITER))
    cfg.freeze()
    return cfg


def _scaled(iterations: Any, factor: float) -> Any:
    if isinstance(iterations, list):  # steps that fall on one iteration are one step
        return sorted({round(factor * step) for step in iterations})
    # What happens at all, or every so many iterations, still does: 0 would say never.
    return max(1, round(factor * iterations)) if iterations else 0


def finished(folder: Path) -> Results | None:
    """The results of a run of a table, or None before its end."""
    if not all((folder / name).is_file() for name in (RECIPE, FINAL, FILE_NAME)):
        return None
    results = read_results(folder)
    return results if any(x.stage == "final" for x in results.evaluations) else None


def write_recipe(cfg: CfgNode) -> None:
    """Keep a run's configuration in its folder, for `check_recipe`. Raises OutputError."""
    write_output(Path(cfg.OUTPUT_DIR) / RECIPE, cfg.dump().encode())


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
        old, new = value_of(before, key), value_of(cfg, key)
        if old != new and key not in FREE_KEYS:
            raise TableError(
                f"{path.parent} has a run with {key} = {old!r}, which is now {new!r} (remove it, "
                "or choose another --output)"
            )


@dataclass(frozen=True)
class Reproduction:
    """A table and how its runs are trained.

    A run is in OUTPUT/TABLE/RUN_seedK, or OUTPUT/TABLE_xSCALE/RUN_seedK: other schedules are other
    runs.

    Attributes:
        table: what is reproduced.
        output: folder of all tables.
        scale: factor of every schedule, above 0.
        overrides: KEY VALUE pairs for every run, after those of the table.
    """

    table: Table
    output: Path
    scale: float = 1.0
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the table and its runs are."""
        name = self.table.path.stem
        return self.output / (name if self.scale == 1 else f"{name}_x{self.scale:g}")

    def train(self, rows: Sequence[Row], seeds: Sequence[int]) -> int:
        """Train the runs that rows need, or go on with them, unless they are finished.

        Returns:
            0, or the exit status of the run that was interrupted.

        Raises:
            UserError: see `config`, `check_recipe` and `runs.run.train`.
        """
        wanted = [(run, seed) for seed in seeds for run in needed_runs(self.table, rows)]
        for number, (run, seed) in enumerate(wanted, start=1):
            logger.info("run %d of %d: %s, seed %d", number, len(wanted), run.name, seed)
            status = self._train_run(run, seed)
            # A run's data are in circles of hooks and trainers, which are small in number and so
            # stay uncollected: a hundred runs on cached features came to 12 GiB.
            gc.collect()
            if status:
                return status
        return 0

    def results(self, rows: Sequence[Row], seeds: Sequence[int]) -> dict[tuple[str, int], Results]:
        """The results of the finished runs that rows show, by name and seed."""
        finished_runs = {
            (run.name, seed): self._finished(run, seed)
            for run in shown_runs(self.table, rows)
            for seed in seeds
        }
        return {key: results for key, results in finished_runs.items() if results is not None}

    def caption(self, seeds: Sequence[int]) -> str:
        """What is in the table, how far it is from the paper, and its note."""
        numbers = ", ".join(map(str, seeds))
        schedule = "" if self.scale == 1 else f", {self.scale:g} times the schedule"
        pairs = zip(self.overrides[::2], self.overrides[1::2], strict=False)
        settings = "".join(f", {key} = {value}" for key, value in pairs if key not in FREE_KEYS)
        note = f". {self.table.note}" if self.table.note else ""
        return f"{self.table.title} (ours: seed {numbers}{schedule}{settings}){note}"

    def config(self, run: Run, seed: int) -> CfgNode:
        """The configuration of a run, before it is scaled."""
        return run_config(
            self.table,
            run,
            seed=seed,
            output=self._run_folder(run.name, seed),
            initial=None if run.after is None else self._run_folder(run.after, seed),
            overrides=self.overrides,
        )

    def _run_folder(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}_seed{seed}"

    def _train_run(self, run: Run, seed: int) -> int:
        if self._finished(run, seed) is not None:
            return 0
        cfg = self.config(run, seed)
        check_recipe(cfg)
        write_recipe(cfg)
        if self.scale != 1:
            # A task counts epochs in iterations, of which an episode needs one.
            cfg = scaled(open_task(cfg).cfg, self.scale)
        return train(cfg, resume_from=True)

    def _finished(self, run: Run, seed: int) -> Results | None:
        """The results of a run of this very configuration, or None before its end."""
        results = finished(self._run_folder(run.name, seed))
        if results is not None:
            check_recipe(self.config(run, seed))
        return results
