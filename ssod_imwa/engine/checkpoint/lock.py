"""One run per output directory."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock

from ssod_imwa.errors import CheckpointError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0
"""How often a holder touches its lock file."""
GUARD = ".run.lock.guard"
"""An empty file that stays: who holds its lock may read and change `run.lock`."""
STALE_SECONDS = 600.0
"""A lock of another host that was not touched for so long is taken over (20 missed heartbeats)."""


def process_is_alive(pid: int, started: str | None = None) -> bool:
    """Whether a process of this host runs; with `started`, whether it is still the same one."""
    try:
        if not psutil.pid_exists(pid):
            return False
    except OverflowError:  # no process has such a number
        return False
    state, now_started = _process_state(pid)
    return state != "Z" and (started is None or now_started is None or started == now_started)


def _process_state(pid: int) -> tuple[str | None, str | None]:
    """A process's state letter and start time in ticks since boot; unknown without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None, None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return fields[0], fields[19]


class RunLock:
    """Holds `run.lock` in a directory; the file names the process, so that others can explain.

    A lock whose process is gone is taken over with a warning. Whether a process of another host is
    gone is judged by its heartbeat.

    Args:
        directory: an existing directory.

    Raises:
        CheckpointError: another process holds the lock.
        OSError: the directory is not writable.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunLock(folder) as lock:
        ...     lock.path.name
        'run.lock'
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory) / "run.lock"
        self._pid = os.getpid()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._acquire()
        try:
            self._thread.start()
        except BaseException:  # a signal may end the program here
            self.abandon()
            raise

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory free; a forked child that inherited this object does nothing."""
        if self._pid != os.getpid() or self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        self.abandon()

    def abandon(self) -> None:
        """Remove the file without waiting for anything, in a process that ends at once."""
        # Nothing to free if the directory was removed or the lock was taken over meanwhile.
        if self._pid == os.getpid() and self._read() == self._owner():
            self.path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        # Held only while the file is read and written, because forked workers would inherit it: it
        # makes "look whether it is stale, then take it" one action.
        with FileLock(self.path.with_name(GUARD)):
            self._refuse_if_held()
            with self.path.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self._owner()))
                file.flush()
                os.fsync(file.fileno())

    def _refuse_if_held(self) -> None:
        owner = self._read()
        if owner is None:
            return
        who = f"process {owner['pid']} on {owner['host']}"
        if owner["host"] == socket.gethostname():
            held = process_is_alive(int(owner["pid"]), owner["started"])
        else:
            held = time.time() - self.path.stat().st_mtime < STALE_SECONDS
        if held:
            raise CheckpointError(
                f"{self.path.parent} is in use by {who} (one run per output directory); choose "
                f"another OUTPUT_DIR, or remove {self.path} if that process is gone"
            )
        logger.warning("taking over %s from %s, which is gone", self.path, who)

    def _owner(self) -> dict[str, Any]:
        return {
            "pid": self._pid,
            "host": socket.gethostname(),
            "started": _process_state(self._pid)[1],
        }

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lock; None for a new, missing or unfinished file."""
        try:
            owner = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) and set(owner) == set(self._owner()) else None

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError as error:
                logger.warning("%s cannot be touched: %s", self.path, error)
