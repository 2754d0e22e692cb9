"""Randomness that is counted, not consumed.

Every random number is drawn from a generator seeded by what it is for (seed, member, own
iteration, slot), so it does not matter how many numbers were drawn before, by how many worker
processes, or whether the run was interrupted. Nothing has to be saved to resume exactly.
"""

import hashlib
import random

import numpy as np
import torch


def counted_seed(*counts: int | str) -> int:
    """A 63-bit seed that is a function of its arguments alone.

    Example:
        >>> counted_seed(1, "order", 0) == counted_seed(1, "order", 0)
        True
        >>> counted_seed(1, "order", 0) == counted_seed(1, "order", 1)
        False
    """
    text = "/".join(f"{type(count).__name__}:{count}" for count in counts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def counted_generator(*counts: int | str) -> np.random.Generator:
    """A NumPy generator whose stream is a function of the arguments alone."""
    return np.random.Generator(np.random.Philox(counted_seed(*counts)))


def seed_everything(*counts: int | str) -> None:
    """Seed Python's, NumPy's and Torch's global generators (all devices) from the arguments."""
    seed = counted_seed(*counts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
