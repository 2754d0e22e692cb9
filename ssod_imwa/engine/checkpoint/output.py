"""An output directory: the names in it, its lock, and who may write there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.engine.checkpoint.atomic import WriteError, remove_stale_temporaries, write_text
from ssod_imwa.engine.checkpoint.lock import RunLock
from ssod_imwa.errors import CheckpointError, UserError, writing

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"
AVERAGED = "model_averaged.pth"
FINAL = "model_final.pth"
LAWA = "model_lawa.pth"

_RESUME_FILE = re.compile(r"model_(\d{7,})\.pth")
_T = TypeVar("_T")


def removed(directory: Path) -> str:
    """What to say when an output directory is gone."""
    return f"output folder {directory} was removed while the run wrote to it: it cannot go on"


def resume_files(directory: str | os.PathLike[str]) -> dict[int, Path]:
    """Files to resume from by their last completed global step, newest first; not verified."""
    found = {
        int(match[1]): path
        for path in Path(directory).glob("model_*.pth")
        if (match := _RESUME_FILE.fullmatch(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def prepare_output(
    directory: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    run: Group = Group(),
) -> RunLock | None:
    """Make an output directory ready for one run and lock it; nothing of an earlier run is removed.

    With `overwrite`, `CheckpointHook` removes the earlier run's checkpoints once the new run has
    done its first step.

    Args:
        directory: OUTPUT_DIR.
        resume: the run in it is continued.
        overwrite: the run in it is replaced.
        run: all ranks, each of which calls this; the first one acts.

    Returns:
        The lock, to be released at the end of the run; None on ranks other than the first.

    Raises:
        CheckpointError: the directory holds checkpoints and neither option is given, both are
            given, or another process uses it.
        OutputError: it cannot be written.
    """
    if resume and overwrite:
        raise CheckpointError("resume and overwrite contradict each other; give one of them")
    lock: list[RunLock] = []
    may_be_used = resume or overwrite
    try:
        on_main(lambda: lock.append(_claim(Path(directory), may_be_used=may_be_used)), run)
    except BaseException:  # a signal may end the program while the other ranks are told
        for held in lock:
            held.release()
        raise
    return lock[0] if lock else None


def refuse_used(directory: Path) -> None:
    """Raise CheckpointError if a directory holds checkpoints."""
    found = [*resume_files(directory).values()]
    found += [path for name in (AVERAGED, FINAL, LAWA) if (path := directory / name).exists()]
    if found:
        raise CheckpointError(
            f"{directory} holds checkpoints of an earlier run ({found[0].name}); continue it with "
            "--resume, replace it with --overwrite, or choose another OUTPUT_DIR"
        )


def _claim(directory: Path, *, may_be_used: bool) -> RunLock:
    if not may_be_used:
        refuse_used(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory)
        try:
            remove_stale_temporaries(directory)
        except BaseException:
            lock.release()
            raise
    return lock


def write_pointer(path: Path) -> None:
    """Name a checkpoint in its directory's `last_checkpoint`. Raises WriteError.

    A folder of this name moves aside.
    """
    pointer = path.with_name(POINTER)
    try:
        if pointer.is_dir():
            aside = pointer.with_name(f"{POINTER}.folder")
            logger.warning("%s is a folder: moved to %s", pointer, aside.name)
            pointer.rename(aside)
        write_text(path.with_name(POINTER), path.name, kind="pointer")
    except OSError as error:
        raise WriteError(f"{path.with_name(POINTER)} could not be written: {error}") from error


def on_main(function: Callable[[], _T], run: Group) -> _T:
    """Call a function on the first rank; its result, or its error, on every rank."""
    return on_some(function, run, here=run.is_main)[0]


def on_some(function: Callable[[], _T], run: Group, *, here: bool) -> list[_T]:
    """Call a function on some ranks; their results in rank order, or the first error, on every one.

    Args:
        function: to be called.
        run: all ranks, each of which calls this.
        here: whether the function is called on this rank.
    """
    outcome: tuple[Any, Exception | None] | None = None
    if here:
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, error)
        except Exception as error:
            if run.size == 1:
                raise
            # Others wait in the exchange below; what they raise has to be picklable.
            logger.exception("rank %d failed", run.rank)
            outcome = (None, RuntimeError(f"rank {run.rank} failed: {error!r}"))
    outcomes = [each for each in run.all_gather(outcome) if each is not None]
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [value for value, _ in outcomes]
