"""Hooks that write what describes a run: config.yaml and results.json."""

from __future__ import annotations

from pathlib import Path

from fvcore.common.config import CfgNode

from ssod_imwa.config.reader import keys, value_of
from ssod_imwa.engine.checkpoint.atomic import write_text
from ssod_imwa.engine.checkpoint.writing import CheckpointHook
from ssod_imwa.engine.evaluation import Evaluations
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import peak_memory
from ssod_imwa.runs.results import Evaluation, Results, write_results
from ssod_imwa.task import Task


class ConfigHook(HookBase):
    """Writes config.yaml once a step is done: an overwritten run keeps its own until then."""

    def __init__(self, path: Path, cfg: CfgNode) -> None:
        self._path = path
        self._text = cfg.dump()

    @property
    def name(self) -> str:
        return "config"

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter and self.trainer.ranks.run.is_main:
            write_text(self._path, self._text, kind="config")


class ResultsHook(HookBase):
    """Writes results.json whenever there is a new evaluation, and at the end."""

    def __init__(
        self, path: Path, task: Task, evaluations: Evaluations, checkpoint: CheckpointHook
    ) -> None:
        self._path = path
        self._task = task
        self._evaluations = evaluations
        self._checkpoint = checkpoint
        self._written = -1

    @property
    def name(self) -> str:
        return "results"

    def after_step(self) -> None:
        count = len(self._evaluations.records)
        is_last = self.trainer.iter + 1 == self.trainer.max_iter
        if (count != self._written or is_last) and self.trainer.ranks.run.is_main:
            self._write()
            self._written = count

    def after_train(self) -> None:
        # Resuming at the very end makes up for an evaluation without doing a step.
        if self.trainer.start_iter == self.trainer.max_iter and self.trainer.ranks.run.is_main:
            self._write()

    def _write(self) -> None:
        write_results(self._path, self._results())

    def _results(self) -> Results:
        task, cfg = self._task, self._task.cfg
        return Results(
            task=task.name,
            dataset=task.dataset,
            method=task.method,
            imwa={key.lower(): value_of(cfg.IMWA, key) for key in keys(cfg.IMWA)},
            seed=cfg.SEED,
            fold=task.fold,
            class_counts=dict(zip(task.classes, task.class_counts, strict=True)),
            burn_in=self.trainer.method.burn_in,
            iterations=cfg.SOLVER.MAX_ITER,
            episode_lengths=self.trainer.schedule.lengths or (),
            wall_time=self._checkpoint.seconds,
            peak_memory=peak_memory(),
            evaluations=tuple(Evaluation(**record) for record in self._evaluations.records),
        )
