"""Caffe's ImageNet ResNets (MSRA R-50.pkl, R-101.pkl), read without running what a pickle says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssod_imwa.data.array_pickles import read_array_pickle
from ssod_imwa.errors import WeightsError

# detectron2's FrozenBN adds 1e-5 to the variance; these files have no statistics, so that with this
# variance the affine map is exactly theirs.
UNIT_VARIANCE = 1.0 - 1e-5
_UNIT = re.compile(r"res([2-5])_(\d+)_branch(1|2[abc])_(.+)")
_CONVOLUTION = {"1": "downsample.0", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM = {"1": "downsample.1", "2a": "bn1", "2b": "bn2", "2c": "bn3"}
_NORM_PARTS = {
    "bn_s": "weight",
    "bn_b": "bias",
    "bn_rm": "running_mean",
    "bn_riv": "running_var",
}
# The ImageNet classifier and the optimizer's state, which a detector has no use for.
_UNUSED = re.compile(r"(fc1000|pred)_[wb]|lr|weight_order|.*_momentum")


def read_caffe_resnet(path: Path) -> dict[str, torch.Tensor]:
    """The convolutions and batch norms of a Caffe2 ResNet under torchvision's names.

    Args:
        path: a pickle of arrays by Caffe name (`res2_0_branch2a_w`, `res2_0_branch2a_bn_s`, ...),
            bare or under the key `blobs` or `model`.

    Returns:
        float32 tensors for a torchvision ResNet without its classifier.

    Raises:
        WeightsError: the file is no such pickle, or holds a name that is not understood.
    """
    try:
        content = read_array_pickle(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise WeightsError(f"{path}: is not a pickle of weights ({error})") from error
    for key in ("blobs", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__} (must be arrays by name)")
    arrays = {
        name: array
        for name, array in content.items()
        if isinstance(name, str) and not _UNUSED.fullmatch(name)
    }
    return _convert(arrays, path)


def _convert(arrays: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    unknown = []
    for name, array in arrays.items():
        numeric = isinstance(array, np.ndarray) and array.dtype.kind == "f"
        target = _torchvision_name(name) if numeric else None
        if target is None:
            unknown.append(name)
            continue
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        (biases if target.endswith("#bias") else state)[target.removesuffix("#bias")] = tensor
    if unknown:
        raise WeightsError(f"{path}: {len(unknown)} names are not a ResNet's: {unknown[:10]}")
    scales = [(n, x) for n, x in state.items() if n.endswith(".weight") and x.dim() == 1]
    for name, scale in scales:
        norm = name.removesuffix(".weight")
        state.setdefault(f"{norm}.running_var", torch.full_like(scale, UNIT_VARIANCE))
        # torchvision's convolutions have no bias; the norm behind subtracts its mean anyway.
        mean = state.pop(f"{norm}.running_mean", torch.zeros_like(scale))
        state[f"{norm}.running_mean"] = mean - biases.pop(norm, torch.zeros_like(scale))
    return state


def _torchvision_name(name: str) -> str | None:
    """The parameter's name; for a convolution's bias its batch norm's and "#bias"."""
    unit = _UNIT.fullmatch(name)
    if unit:
        stage, block, branch, part = unit.groups()
        prefix = f"layer{int(stage) - 1}.{block}."
        convolution, norm = prefix + _CONVOLUTION[branch], prefix + _NORM[branch]
    elif name.startswith("conv1_"):
        convolution, norm, part = "conv1", "bn1", name.removeprefix("conv1_")
    elif name.startswith("res_conv1_"):
        convolution, norm, part = "conv1", "bn1", name.removeprefix("res_conv1_")
    else:
        return None
    if part == "w":
        return f"{convolution}.weight"
    if part == "b":
        return f"{norm}#bias"
    return f"{norm}.{_NORM_PARTS[part]}" if part in _NORM_PARTS else None
