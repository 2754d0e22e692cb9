"""Pickles of arrays that other programs wrote, read without running what they say."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np

# What a pickled NumPy array or scalar calls. The first two by example, because the functions moved
# between NumPy 1 and 2 and files name either place.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float32(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", _RECONSTRUCT), ("scalar", _SCALAR))
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain containers; any other class or function is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, but only NumPy arrays and plain types are allowed"
            ) from None


def read_array_pickle(path: Path) -> Any:
    """What a pickle of Python 2 or 3 holds, if it is made of NumPy arrays and plain types.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such pickle.
    """
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle raises almost anything
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
