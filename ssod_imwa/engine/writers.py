"""Where the numbers of a run go: metrics.json and TensorBoard; see `terminal`, too."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.engine.events import EventStorage
from ssod_imwa.engine.time_left import TimeLeft
from ssod_imwa.engine.trainer import HookBase

logger = logging.getLogger(__name__)

# Where a row stands; everything else in it is a measured number.
PLACE = ("iteration", "episode", "member", "t")


class Writer:
    """Receives rows: dicts of `iteration` (global step), `episode`, `member`, `t` and numbers.

    Attributes:
        name: key of the writer's state.
    """

    name = "writer"

    def open(self, start_iter: int) -> None:
        """Get ready for rows from this global step on."""

    def step(self, position: Position) -> None:
        """A step has ended."""

    def write(self, row: dict[str, Any]) -> None:
        """Take a row."""

    def close(self) -> None:
        """No more rows will come; also called when training fails, or when `open` was not."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class JSONWriter(Writer):
    """Writes one JSON object a line, detectron2's metrics.json; NaN and infinities become null.

    Its state is the length of the file, so a resumed run continues after the rows that the
    checkpoint knew; what a killed run wrote later, perhaps half a line, is cut off. A new run
    empties the file with its first row: if it ends before, nothing of an earlier run is lost.

    Args:
        path: the file; its folder is made when training starts.
    """

    name = "json"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._length = 0
        self._is_new = True
        self._file: IO[bytes] | None = None

    def open(self, start_iter: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._file = self.path.open("r+b")
        rows = self._file.read(self._length)
        if len(rows) < self._length:
            logger.warning(
                "%s has %d of the %d bytes that the checkpoint knew; rows are missing",
                self.path,
                len(rows),
                self._length,
            )
        self._file.seek(rows.rfind(b"\n") + 1)
        self._is_new = start_iter == 0
        if not self._is_new:
            self._file.truncate()

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open (rows are written while training runs)")
        if self._is_new:
            self._file.truncate()
            self._is_new = False
        strict = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._file.write(json.dumps(strict, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._length = self._file.tell()
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        if self._file is None:
            return {"length": self._length}
        # A checkpoint that survives a power failure must not know rows that do not.
        os.fsync(self._file.fileno())
        return {"length": self._file.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._length = state.get("length", 0)


class TensorBoardWriter(Writer):
    """Writes the numbers of rows as TensorBoard scalars over global steps.

    Its state is the length of each file of events, so that a resumed run takes back what the
    checkpoint did not know, such as an evaluation that is made up for, and no point comes twice. A
    file is begun with the first row: TensorBoard hides what earlier runs wrote from there on.

    Args:
        directory: of the files.
        by_member: whether a member's scalars are its own, "member0/total_loss", because members
            share global steps.
    """

    name = "tensorboard"

    def __init__(self, directory: str | Path, *, by_member: bool = False) -> None:
        self.directory = Path(directory)
        self._by_member = by_member
        self._writer: Any = None
        self._report_thread = threading.excepthook
        self._start_iter = 0
        self._lengths: dict[str, int] = {}

    def open(self, start_iter: int) -> None:
        self._start_iter = start_iter
        lengths, self._lengths = self._lengths, {}
        files = {path.name: path for path in self._files()}
        if not files.keys() & lengths.keys():  # a new run, or one resumed from another folder
            return
        for name, path in files.items():
            if name not in lengths:
                path.unlink()
            elif path.stat().st_size > lengths[name]:
                os.truncate(path, lengths[name])

    def write(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self._writer = SummaryWriter(str(self.directory), purge_step=self._start_iter)
            self._report_thread, threading.excepthook = threading.excepthook, self._report_once
        is_of_member = self._by_member and row["member"] is not None
        prefix = f"member{row['member']}/" if is_of_member else ""
        for name, value in row.items():
            if name != "iteration" and value is not None:
                self._writer.add_scalar(prefix + name, value, row["iteration"])

    def _report_once(self, failure: threading.ExceptHookArgs) -> None:
        """Leave out what ends TensorBoard's thread: its next call here raises the same."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._report_thread(failure)

    def close(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.close()
        finally:
            threading.excepthook = self._report_thread

    def state_dict(self) -> dict[str, Any]:
        if self._writer is not None:
            self._writer.flush()
        return {"lengths": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lengths = dict(state.get("lengths", {}))

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("events.out.tfevents.*"))


class MetricsHook(HookBase):
    """Gives a row to every writer each period and at each member's end.

    A number is the median of its values since the row before, so it never mixes two members; on
    several ranks it is the mean over the member's ranks, and the longest for times. Members that
    are trained at once have a row each, in their order. The main rank writes.

    Args:
        writers: where rows go.
        period: global steps between two rows.
        time_left: estimates the rest of the run.
    """

    def __init__(self, writers: Sequence[Writer], period: int, time_left: TimeLeft) -> None:
        if period < 1:
            raise ValueError(f"period = {period} is not allowed (must be at least 1)")
        self.writers = writers
        self.period = period
        self._time_left = time_left
        self._last_row = -1
        self._step_end: float | None = None
        self._evaluation_seconds = 0.0

    @property
    def name(self) -> str:
        return "metrics"

    def before_train(self) -> None:
        if self.trainer.ranks.run.is_main:
            for writer in self.writers:
                writer.open(self.trainer.start_iter)

    def before_step(self) -> None:
        before, self._evaluation_seconds = (
            self._evaluation_seconds,
            self._time_left.evaluation_seconds,
        )
        if self._step_end is not None:
            since = time.perf_counter() - self._step_end
            self._time_left.between(since - (self._evaluation_seconds - before))

    def after_step(self) -> None:
        position = self.trainer.position
        self._step_end = self.trainer.step_end
        self._time_left.step(position, self.trainer.step_seconds)
        if self.trainer.ranks.run.is_main:
            for writer in self.writers:
                writer.step(position)
        if (position.global_step + 1) % self.period and not position.ends_member:
            return
        row = _over_ranks(self.trainer.ranks.batch.all_gather(self._row(position)))
        self._last_row = position.global_step
        rows = self.trainer.ranks.exchange.all_gather(row)
        if self.trainer.ranks.run.is_main:
            for row_of_member in rows[: position.members]:
                for writer in self.writers:
                    writer.write(row_of_member)

    def after_train(self) -> None:
        for writer in self.writers:
            writer.close()

    def state_dict(self) -> dict[str, Any]:
        storage: EventStorage = self.trainer.storage
        hints = storage.smoothing_hints()
        recent = [
            [name, hints[name], [list(value) for value in values]]
            for name, values in self._recent().items()
        ]
        return {
            "last_row": self._last_row,
            # What the next row will summarize, so that it is the same after a resume: each rank's
            # own numbers, as the file is written by one of them.
            "recent": self.trainer.ranks.run.all_gather(recent),
            "writers": {writer.name: writer.state_dict() for writer in self.writers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._last_row = state["last_row"]
        # An inexact resume may have more ranks than the run had: theirs begin with nothing.
        by_rank = state["recent"]
        rank = self.trainer.ranks.run.rank
        for name, hint, values in by_rank[rank] if rank < len(by_rank) else []:
            for value, step in values:
                self.trainer.storage.put_scalar(name, value, hint, cur_iter=step)
        for writer in self.writers:
            writer.load_state_dict(state["writers"].get(writer.name, {}))

    def _recent(self) -> dict[str, list[tuple[float, int]]]:
        """Values since the last row, by name."""
        storage: EventStorage = self.trainer.storage
        recent = {name: storage.since(name, self._last_row + 1) for name in storage.histories()}
        return {name: values for name, values in recent.items() if values}

    def _row(self, position: Position) -> dict[str, Any]:
        storage: EventStorage = self.trainer.storage
        hints = storage.smoothing_hints()
        row: dict[str, Any] = {
            "iteration": position.global_step,
            "episode": position.episode,
            "member": position.member,
            "t": position.t,
        }
        for name, values in self._recent().items():
            numbers = [value for value, _ in values]
            row[name] = float(np.median(numbers)) if hints[name] else numbers[-1]
        row["peak_memory_mb"] = peak_memory() / 2**20
        row["eta_seconds"] = self._time_left.seconds(position)
        return row


def _over_ranks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all ranks; a name that only some ranks have is summarized over those."""
    if len(rows) == 1:
        return rows[0]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if name in PLACE:
            merged[name] = values[0]
        elif name in ("time", "data_time", "eta_seconds", "peak_memory_mb"):
            merged[name] = max(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged


def peak_memory() -> int:
    """Largest memory of this process so far in bytes: allocated on the GPU, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
