"""Places where a test may kill the process or make a write fail.

Nothing happens unless the environment variable SSOD_IMWA_FAULT is set, to ``point=action`` or, for
the n-th time a point is reached, ``point=action@n``. Actions: ``kill`` (SIGKILL to this process, as
a power cut or a preempted machine looks from inside) and ``fail`` (OSError, as from a full disk).

Points, in the order in which a checkpoint reaches them:

=====================  ====================================================================
``step:G``             global step G is done, its checkpoint is not begun
``write:open``         before the temporary file is opened
``write:N``            N bytes of the file are written (N a number)
``write:fsync``        all bytes are written, none is known to be on the disk
``digest:...``         the same points of the digest file
``write:replace``      before the temporary takes the final name
``pointer:...``        the same points of ``last_checkpoint``
``retention``          before an old checkpoint is removed
``retention:digest``   between the removal of a checkpoint and that of its digest file
=====================  ====================================================================
"""

from __future__ import annotations

import errno
import os
import signal
from typing import IO, Any, cast

VARIABLE = "SSOD_IMWA_FAULT"

_reached: dict[str, int] = {}


def reach(point: str) -> None:
    """Do what SSOD_IMWA_FAULT asks for at this point."""
    if (wanted := os.environ.get(VARIABLE)) is None:
        return
    name, _, action = wanted.partition("=")
    if name != point:
        return
    action, _, number = action.partition("@")
    _reached[point] = _reached.get(point, 0) + 1
    if _reached[point] == int(number or 1):
        _act(action, point)


def tearing(file: IO[bytes], kind: str) -> IO[bytes]:
    """The file itself, or one that reaches `kind:N` once N bytes are written if that is asked."""
    name, _, count = os.environ.get(VARIABLE, "").partition("=")[0].partition(":")
    if name != kind or not count.isdigit():
        return file
    return cast("IO[bytes]", _TearingFile(file, kind, int(count)))


class _TearingFile:
    def __init__(self, file: IO[bytes], kind: str, count: int) -> None:
        self._file, self._kind, self._count, self._written = file, kind, count, 0

    def write(self, data: Any) -> int:
        data = bytes(data)
        first = self._count - self._written
        if 0 <= first < len(data):
            self._file.write(data[:first])
            self._file.flush()
            reach(f"{self._kind}:{self._count}")
            self._file.write(data[first:])
        else:
            self._file.write(data)
        self._written += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _act(action: str, point: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail":
        raise OSError(errno.ENOSPC, f"no space left, as asked by {VARIABLE} at {point}")
    raise ValueError(f"{VARIABLE}: action {action!r} is not allowed (must be kill or fail)")
