"""Whether batches of other processes fit into the memory through which they come."""

from __future__ import annotations

import logging
import shutil

logger = logging.getLogger(__name__)

PLACE = "/dev/shm"
# Locks and queues of a few processes, and records, before any batch.
LEAST = 16 * 2**20
# From here on no first batch is made to measure it: what does not fit ends the run with a message.
AMPLE = 2 * 2**30

_said: list[str] = []


def free_bytes() -> int | None:
    """Free shared memory; None where no file system bounds it (macOS, Windows)."""
    try:
        return shutil.disk_usage(PLACE).free
    except OSError:
        return None


def is_scarce() -> bool:
    """Whether some runs' batches do not fit, so that one has to be measured."""
    free = free_bytes()
    return free is not None and free < AMPLE


def describe() -> str:
    """Its size in words."""
    try:
        usage = shutil.disk_usage(PLACE)
    except OSError:
        return "shared memory"
    return f"shared memory {PLACE} has {megabytes(usage.total)}, {megabytes(usage.free)} free"


def megabytes(count: int) -> str:
    """A number of bytes for people.

    Example:
        >>> megabytes(64 * 2**20)
        '64.0 MB'
    """
    return f"{count / 2**20:.1f} MB"


def fitting_workers(num_workers: int, needed: int = LEAST) -> int:
    """The processes asked for, or 0, said once, where shared memory is too small for them.

    Args:
        num_workers: processes.
        needed: bytes.
    """
    free = free_bytes()
    if not num_workers or free is None or free >= needed:
        return num_workers
    _say_once(f"{num_workers} processes need {megabytes(needed)}")
    return 0


def _say_once(need: str) -> None:
    if not _said:
        logger.warning(
            "images are read without processes, which is slower: %s, but %s (enlarge it, in Docker "
            "with --shm-size, or set DATALOADER.NUM_WORKERS 0)",
            describe(),
            need,
        )
    _said.append(need)
