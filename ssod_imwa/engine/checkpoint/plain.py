"""States as tensors and plain Python values, which `torch.load(weights_only=True)` accepts."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
)


def plain(value: Any, path: str = "state") -> Any:
    """The same value, free of every type that only unpickling arbitrary code could restore.

    Tensors are detached and otherwise shared, not copied; one that is a view of a larger storage is
    cloned, since a file would hold the whole storage. NumPy scalars become Python numbers, NumPy
    arrays tensors, other dictionaries (defaultdict, ...) dict, paths str. An OrderedDict stays one,
    because a module's state keeps its version numbers there.

    Args:
        value: a state: any nesting of dict, list, tuple and set.
        path: what the value is called in errors.

    Raises:
        TypeError: a value has no plain form; the message says where it is.

    Example:
        >>> plain({"best": np.float64(0.5), "file": PurePath("a/b")})
        {'best': 0.5, 'file': 'a/b'}
    """
    if type(value) in _ATOMS:
        return value
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, path)
    if isinstance(value, np.generic):
        return plain(value.item(), path)
    if isinstance(value, np.ndarray):
        return _plain_array(value, path)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return _plain_dict(value, path)
    if type(value) in (list, tuple, set):
        return type(value)(plain(item, f"{path}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
        "cannot hold (must be tensors, numbers, str, bytes, None, or dict, list, tuple and set of "
        "them)"
    )


def _plain_tensor(tensor: torch.Tensor, path: str) -> torch.Tensor:
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        raise TypeError(
            f"{path} is a {type(tensor).__name__} with layout {tensor.layout}, which a checkpoint "
            "cannot hold (must be an ordinary dense tensor)"
        )
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _plain_array(array: np.ndarray, path: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))  # a copy: read-only arrays cannot be shared
    except TypeError as error:
        raise TypeError(f"{path} is an array of {array.dtype}, which has no tensor") from error


def _plain_dict(value: dict[Any, Any], path: str) -> dict[Any, Any]:
    items = (
        (plain(key, f"{path}: key {key!r}"), plain(item, f"{path}[{key!r}]"))
        for key, item in value.items()
    )
    if isinstance(value, OrderedDict):
        result = OrderedDict(items)
        # Attributes of a module's state: the versions by which load_state_dict converts old states.
        if hasattr(value, "_metadata"):
            result._metadata = plain(value._metadata, f"{path}._metadata")  # type: ignore[attr-defined]
        return result
    return Counter(dict(items)) if type(value) is Counter else dict(items)
