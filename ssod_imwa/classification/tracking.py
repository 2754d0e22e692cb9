"""Hooks that watch a classifier while it trains: numbers of each class, and snapshots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssod_imwa.averaging.episodes import Position
from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.features import extract, feature_deviation
from ssod_imwa.classification.gradients import by_class, measure_reaction
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.engine.checkpoint.atomic import remove_checkpoint, write_checkpoint
from ssod_imwa.engine.checkpoint.output import on_main, on_some
from ssod_imwa.engine.modes import undisturbed
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.engine.writers import JSONWriter

CLASSES_FILE = "classes.json"
SNAPSHOT_FOLDER = "snapshots"
_SNAPSHOT = re.compile(r"member(\d+)_t(\d{7,})\.pth")


@dataclass(frozen=True)
class TrackingOptions(Options):
    """How often classes are looked at."""

    track_period: int = option(
        0,
        "own iterations between two records of what each class has learned (classes.json), which "
        "tools/analyze.py draws; 0 makes none",
        low=0,
        iterations=True,
    )


@dataclass(frozen=True)
class SnapshotOptions(Options):
    """How often weights are kept."""

    snapshot_period: int = option(
        0,
        "own iterations between two snapshots of each member's weights, which tools/analyze.py "
        "draws; 0 makes none",
        low=0,
        iterations=True,
    )


class ClassTrackingHook(HookBase):
    """Writes how the student treats each class, one JSON object a line.

    A row has where it was made (`iteration`, `episode`, `member`, `t`, counted from 0) and lists of
    a number for each class: `accuracy`, `gradient_norm`, `ratio` (see `ClassReaction`) and
    `deviation` (see `feature_deviation`), null where a class has no images. All are measured in
    eval mode, without augmentation or mixing, and disturb nothing: the run is the same without.

    It belongs before IMWA's hook, while a member's last weights are still live, and before the
    checkpoint, which then knows the row.

    Args:
        path: of the file, `classes.json`.
        train: batches of the training images or of a fixed balanced part, readable again and again,
            shared out to the processes that train a member.
        test: batches of the test images, likewise.
        classes: C.
        period: own iterations of a member between two rows; the last one always has a row.
        seed: of the run, for the subsets of `feature_deviation`.
        first_member: number of the schedule's member 0.
        group: see `measure_reaction`.
        draws: R of `feature_deviation`.

    Raises:
        ValueError: `period` is below 1.
    """

    def __init__(
        self,
        path: str | Path,
        train: TestBatches | Sequence[Part],
        test: TestBatches | Sequence[Part],
        *,
        classes: int,
        period: int,
        seed: int,
        first_member: int = 0,
        group: str | None = None,
        draws: int = 1000,
    ) -> None:
        check_at_least_1(period=period)
        self._writer = JSONWriter(path)
        self._train = train
        self._test = test
        self._classes = classes
        self._period = period
        self._seed = seed
        self._first_member = first_member
        self._group = group
        self._draws = draws

    @property
    def name(self) -> str:
        return "class tracking"

    def before_train(self) -> None:
        if self.trainer.ranks.run.is_main:
            self._writer.open(self.trainer.start_iter)

    def after_step(self) -> None:
        position = self.trainer.position
        if not _is_due(position, self._period, self.trainer.schedule.iterations):
            return
        row = None if self.trainer.has_dropped else self._row(position)
        rows = self.trainer.ranks.exchange.all_gather(row)
        if self.trainer.ranks.run.is_main:
            for row_of_member in filter(None, rows[: position.members]):
                self._writer.write(row_of_member)

    def after_train(self) -> None:
        self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        return self._writer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._writer.load_state_dict(state)

    def _row(self, position: Position) -> dict[str, Any]:
        place = {
            "iteration": position.global_step,
            "episode": position.episode,
            "member": position.member,
            "t": position.t,
        }
        return place | {name: _listed(x) for name, x in self._measure(position).items()}

    def _measure(self, position: Position) -> dict[str, np.ndarray]:
        student = self.trainer.method.student
        with undisturbed(student):
            processes = self.trainer.ranks.batch
            reaction = measure_reaction(student, self._train, processes, group=self._group)
            test = extract(student, self._test, processes)
        member = self._first_member + position.member
        classes = by_class(reaction, classes=self._classes)
        return {
            "accuracy": classes.accuracy,
            "gradient_norm": classes.gradient_norm,
            "ratio": classes.ratio,
            "deviation": feature_deviation(
                reaction.features,
                reaction.labels,
                test.joined_features,
                test.labels,
                classes=self._classes,
                generator=counted_generator(self._seed, "deviation", member, position.t),
                draws=self._draws,
            ),
        }


class SnapshotHook(HookBase):
    """Keeps the student's weights of each member while it trains, for IMWA's figure 1.

    `member0_t0000123.pth` holds "student", its state dict after the member's own iteration 123,
    "member" and "t". It belongs before IMWA's hook, while a member's last weights are still live.
    A new run removes the snapshots of an earlier one after its first step.

    Args:
        folder: of the files, made when the first one is written.
        period: own iterations of a member between two snapshots; the last one always has one.
        first_member: number of the schedule's member 0.

    Raises:
        ValueError: `period` is below 1.
    """

    def __init__(self, folder: str | Path, *, period: int, first_member: int = 0) -> None:
        check_at_least_1(period=period)
        self._folder = Path(folder)
        self._period = period
        self._first_member = first_member

    @property
    def name(self) -> str:
        return "snapshots"

    def after_step(self) -> None:
        position = self.trainer.position
        if position.global_step == 0:
            on_main(self._remove_earlier, self.trainer.ranks.run)
        if _is_due(position, self._period, self.trainer.schedule.iterations):
            speaks = self.trainer.speaks_for_member and not self.trainer.has_dropped
            on_some(lambda: self._write(position), self.trainer.ranks.run, here=speaks)

    def _write(self, position: Position) -> None:
        member = self._first_member + position.member
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {
            "student": self.trainer.method.student.state_dict(),
            "member": member,
            "t": position.t,
        }
        write_checkpoint(snapshot_path(self._folder, member, position.t), content)

    def _remove_earlier(self) -> None:
        for path in snapshot_files(self._folder).values():
            remove_checkpoint(path)


def snapshot_path(folder: str | Path, member: int, t: int) -> Path:
    """Where a member's weights after its own iteration t are.

    Example:
        >>> snapshot_path("run", 0, 123).as_posix()
        'run/member0_t0000123.pth'
    """
    return Path(folder) / f"member{member}_t{t:07d}.pth"


def snapshot_files(folder: str | Path) -> dict[tuple[int, int], Path]:
    """The snapshots in a folder by (t, member), in this order; not verified."""
    files = {
        (int(match[2]), int(match[1])): path
        for path in Path(folder).glob("member*_t*.pth")
        if (match := _SNAPSHOT.fullmatch(path.name))
    }
    return dict(sorted(files.items()))


def _is_due(position: Position, period: int, iterations: int) -> bool:
    done = position.t + 1
    return done % period == 0 or done == iterations


def _listed(values: np.ndarray) -> list[float | None]:
    """Six digits are beyond any noise here, and thousands of classes make long lines."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values.tolist()]
