"""Files that are either complete and verified on disk, or not there.

A file is written under a temporary name in its own directory, synced, read back, described in
``<name>.json`` (size and SHA-256) and only then renamed. The digest is needed because an archive
with one flipped bit in its tensor data loads without an error and with wrong weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from ssod_imwa.engine.checkpoint import faults
from ssod_imwa.engine.checkpoint.lock import STALE_SECONDS, process_is_alive
from ssod_imwa.errors import CheckpointError, writing

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r".+\.tmp\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)")
_READ_BYTES = 1 << 22


class WriteError(CheckpointError):
    """A file could not be written; what was there before is unchanged."""


def write_checkpoint(path: Path, value: Any) -> None:
    """Replace `path` by `value`, which holds tensors and plain types only (see `plain`).

    At every instant, power loss included, `damage(path)` is None for the old or the new content.

    Raises:
        WriteError: the disk is full, the directory is gone or read-only, or what was read back is
            not what was written.
    """

    def describe(temporary: Path, digest: dict[str, Any]) -> None:
        with zipfile.ZipFile(temporary) as archive:
            archive.infolist()
        # Names that are reused (model_averaged.pth) stay verifiable between the two renames because
        # the digest of the content that is about to be replaced is kept.
        previous = _digests(path)[:1] if damage(path) is None else []
        text = json.dumps({**digest, "previous": previous}, indent=1)
        _replace(digest_path(path), lambda file: file.write(text.encode()), kind="digest")

    try:
        _replace(path, lambda file: torch.save(value, file), kind="write", before=describe)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: torch's writer
        raise WriteError(f"{path} could not be written: {_first_line(error)}") from error


def write_text(path: Path, text: str, *, kind: str) -> None:
    """Replace `path` by a text; `kind` names it in fault injection. Raises OSError."""
    _replace(path, lambda file: file.write(text.encode()), kind=kind)


def make_room(path: Path) -> None:
    """Make the folders above a file that a user named. Raises OutputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that a user named, and the folders above it.

    Raises:
        OutputError: it cannot be written; what was there before is unchanged.
    """
    make_room(path)
    with writing(path):
        _replace(path, lambda file: file.write(content), kind="output")


def digest_path(path: Path) -> Path:
    """Where the size and the SHA-256 of a file are kept."""
    return path.with_name(path.name + ".json")


def damage(path: Path) -> str | None:
    """What is wrong with a file that `write_checkpoint` wrote, or None if it is intact."""
    if not path.is_file():
        return "it is not a file" if path.exists() else "it does not exist"
    if not digest_path(path).is_file():
        return f"its digest file {digest_path(path).name} does not exist"
    try:
        expected = _digests(path)
        found = _measure(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it or its digest file cannot be read ({_first_line(error)})"
    if found in expected:
        return None
    newest = expected[0]
    if found["bytes"] != newest["bytes"]:
        return f"it has {found['bytes']} bytes instead of {newest['bytes']}"
    return f"its SHA-256 is {found['sha256'][:12]}... instead of {newest['sha256'][:12]}..."


def load_checkpoint(path: Path) -> Any:
    """Read a checkpoint's tensors (on the CPU) and plain values; no code of the file is run.

    Raises:
        CheckpointError: the file cannot be read or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or damaged archive can raise anything
        raise CheckpointError(f"{path} cannot be loaded: {_first_line(error)}") from error


def remove_checkpoint(path: Path) -> None:
    """Remove a file and its digest, if they are there; a failure is logged and otherwise ignored.

    The file goes first: a digest without a file is harmless, the reverse looks like damage.
    """
    try:
        faults.reach("retention")
        path.unlink(missing_ok=True)
        faults.reach("retention:digest")
        digest_path(path).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def remove_stale_temporaries(directory: Path) -> None:
    """Remove what killed processes left.

    Their names hold host and process. On this host the process tells whether it is gone; on another
    one the file has to be as old as a lock that is taken over.
    """
    for path in directory.glob("*.tmp.*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            if match["host"] == _host():
                gone = not process_is_alive(int(match["pid"]))
            else:
                gone = time.time() - path.stat().st_mtime >= STALE_SECONDS
            if gone:
                logger.warning("removing %s, left by process %s", path, match["pid"])
                path.unlink()


def _host() -> str:
    """This host in eight letters that a file name may hold."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


class _HashingFile:
    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256, self._bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        self._bytes += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}


def _replace(
    path: Path,
    write: Callable[[Any], object],
    *,
    kind: str,
    before: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:
    """Write, sync, read back, call `before(temporary, digest)`, rename, sync the directory."""
    temporary = path.with_name(f"{path.name}.tmp.{_host()}.{os.getpid()}")
    try:
        faults.reach(f"{kind}:open")
        with temporary.open("wb") as file:
            hashing = _HashingFile(faults.tearing(file, kind))
            try:
                write(hashing)
            except RuntimeError as error:
                # torch's archive writer hides why the file failed behind a message of its own.
                if hashing.error is None:
                    raise
                raise hashing.error from error
            file.flush()
            faults.reach(f"{kind}:fsync")
            os.fsync(file.fileno())
        digest = hashing.digest()
        if _measure(temporary) != digest:
            raise OSError("what was read back is not what was written")
        if before is not None:
            before(temporary, digest)
        faults.reach(f"{kind}:replace")
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        # Gone after a success; after a failure even its removal may fail, and that is no news.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut, where a directory can be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> dict[str, Any]:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _digests(path: Path) -> list[dict[str, Any]]:
    """Contents that count as intact: the newest, then the one it was about to replace."""
    described = json.loads(digest_path(path).read_text())
    return [
        {"bytes": int(digest["bytes"]), "sha256": str(digest["sha256"])}
        for digest in (described, *described["previous"])
    ]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
