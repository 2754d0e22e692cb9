"""How the process holds the memory that training on a CPU frees and takes at every step."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1
_1_GB = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, instead of giving it back at once.

    Left alone, it returns a step's activations to the system when the step ends, and the next step
    pays a page fault for every 4 KB of them. What one tensor of more than 1 GB takes still goes
    back. The process stays as large as it has been.

    Returns:
        Whether the C library is one that can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Set, either stops glibc from adapting both.
    return bool(mallopt(_M_MMAP_THRESHOLD, _1_GB) and mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
