"""What a person at the terminal sees of a run: its rows, and how far an evaluation is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.text import Text

from ssod_imwa.averaging.episodes import EpisodeSchedule, Position
from ssod_imwa.engine.evaluation import STAGES
from ssod_imwa.engine.writers import Writer
from ssod_imwa.errors import one_line

logger = logging.getLogger(__name__)

# Without a terminal, an evaluation says how far it is after so long.
_LINE_SECONDS = 60.0


class EvaluationProgress:
    """Shows how far an evaluation is: a bar on a terminal, elsewhere a log line a minute.

    Args:
        console: None takes rich's console on standard error.

    Example:
        >>> progress = EvaluationProgress()
        >>> with progress.shown():
        ...     progress(1, 2)  # a batch of two
        ...     progress(2, 2)
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._said = 0.0

    def join(self, bars: Progress | None) -> None:
        """Show the bar among others: a terminal bears one live display; None stands alone again."""
        self._bars = bars

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While an evaluation runs."""
        alone = self._console.is_terminal and self._bars is None
        if alone:
            self._bars = _Bars(self._console)
            self._bars.start()
        self._said = time.monotonic()
        try:
            yield
        finally:
            if self._bars is not None and self._task is not None:
                self._bars.remove_task(self._task)
            self._task = None
            if alone and self._bars is not None:
                self._bars.stop()
                self._bars = None

    def __call__(self, done: int, total: int) -> None:
        """So many batches of so many are done."""
        if self._bars is not None:
            if self._task is None:
                self._task = self._bars.add_task("evaluating", total=total, numbers="")
            numbers = f"{done} of {total} batches"
            self._bars.update(self._task, total=total, completed=done, numbers=numbers)
        elif time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            logger.info("evaluating: %d of %d batches", done, total)


class _Bars(Progress):
    """Bars with a text before and the field `numbers` behind.

    A terminal that was closed refuses them: nobody reads them then, and the run has to be saved.
    """

    def __init__(self, console: Console) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}", markup=False),
        ]
        super().__init__(*columns, console=console)

    def start(self) -> None:
        with suppress(OSError):
            super().start()

    def stop(self) -> None:
        with suppress(OSError):
            super().stop()

    def refresh(self) -> None:
        with suppress(OSError):
            super().refresh()


class TerminalWriter(Writer):
    """Shows a progress bar on a terminal, and elsewhere one log line for each row.

    Args:
        schedule: tells how many episodes, members and iterations there are.
        console: None takes rich's console on standard error, where log lines go, too.
        evaluation: shows its bar among this one's.
    """

    name = "terminal"

    def __init__(
        self,
        schedule: EpisodeSchedule,
        console: Console | None = None,
        evaluation: EvaluationProgress | None = None,
    ) -> None:
        self._schedule = schedule
        self._console = console or Console(stderr=True)
        self._evaluation = evaluation
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def open(self, start_iter: int) -> None:
        if not self._console.is_terminal:
            return
        self._progress = _Bars(self._console)
        self._task = self._progress.add_task(
            "starting", total=len(self._schedule), completed=start_iter, numbers=""
        )
        self._progress.start()
        if self._evaluation is not None:
            self._evaluation.join(self._progress)

    def step(self, position: Position) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(
                self._task,
                completed=position.global_step + 1,
                description=self._place(position),
            )

    def write(self, row: dict[str, Any]) -> None:
        position = self._schedule.position(row["iteration"])
        # Where members are trained at once, rows are of other ranks, too.
        member = row.get("member", position.member)
        position = position._replace(member=position.members - 1 if member is None else member)
        if "total_loss" not in row:  # an evaluation, or a member that was dropped has no losses
            if measured := _evaluation(row, name_stage=self._schedule.members > 1):
                self._say(f"{self._place(position)}  {measured}")
        elif self._progress is not None and self._task is not None:
            self._progress.update(self._task, numbers=_numbers(row))
        else:
            self._say(f"{self._place(position)}  {_numbers(row)}")

    def close(self) -> None:
        if self._progress is None:
            return
        if self._evaluation is not None:
            self._evaluation.join(None)
        self._progress.stop()
        self._progress = self._task = None

    def _place(self, position: Position) -> str:
        return "  ".join(self._schedule.in_words(position))

    def _say(self, line: str) -> None:
        if self._progress is None:
            logger.info("%s", line)
            return
        with suppress(OSError):  # as for bars
            # Text: of a string, rich would take a class named [bold] or :x: for markup.
            self._progress.console.print(Text(one_line(line)))


def _numbers(row: dict[str, Any]) -> str:
    parts = [f"loss {row['total_loss']:.4g}"]
    if "pseudo_boxes" in row:
        parts.append(f"pseudo-labels {row['pseudo_boxes']:.3g} an image")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.3g}")
    if "time" in row:
        parts.append(f"{row['time']:.3g} s/it")
    if "eta_seconds" in row:
        parts.append(f"left {timedelta(seconds=round(row['eta_seconds']))}")
    return "  ".join(parts)


def _evaluation(row: dict[str, Any], *, name_stage: bool) -> str:
    """The first two metrics of each model; the others are in metrics.json and results.json.

    The stage of a run with one member is left out, as nothing is averaged, unless it is LAWA.
    """
    metrics: dict[str, list[str]] = {}
    for key, value in row.items():
        stage, *rest = key.split("/", 2)
        if rest and stage in STAGES:
            model, name = rest
            title = f"{stage} {model}" if name_stage or stage == "lawa" else model
            metrics.setdefault(title, []).append(f"{name} {value:.2f}")
    return "  ".join(" ".join([model, *found[:2]]) for model, found in metrics.items())
