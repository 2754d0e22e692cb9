"""Weights that other programs wrote: unwrapped where that is safe, else named for what they are."""

from __future__ import annotations

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ssod_imwa.errors import WeightsError

State = dict[str, torch.Tensor]

# Where trainers keep a model's state dict, beside its optimizer and settings.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
)
# Parts of names that torch's own wrappers add at any depth.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# First bytes of what is no file of weights at all.
MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer (fetch the file itself: git lfs pull)"),
    (b"<!DOCTYPE", "a web page (download the file itself)"),
    (b"<html", "a web page (download the file itself)"),
    (b"\x89HDF", "an HDF5 file (must be written by torch.save)"),
)
ALONE = "save the weights alone: torch.save(model.state_dict(), FILE)"


def read_content(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; no code of the file is run.

    Tensors, plain values and the settings of an argparse command line are read.

    Raises:
        WeightsError: the file is missing or damaged, or holds anything else; it says what.
    """
    try:
        with safe_globals([Namespace]):  # holds values and does nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: there is no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except (
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        # torch's own text advises to load with weights_only=False, which would run the file's code.
        raise WeightsError(f"{path}: is {_what_it_is(path, str(error))}") from error


def plain_state(content: Any, source: str) -> State:
    """The one state dict in what `read_content` returned, under the names of the bare model.

    Args:
        content: a state dict, or what a trainer saved with it.
        source: for messages.

    Raises:
        WeightsError: it holds none, or several.
    """
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    while isinstance(content, Mapping):
        inside = [key for key in CONTAINERS if isinstance(content.get(key), Mapping)]
        if len(inside) > 1:
            raise WeightsError(
                f"{source}: holds several models: {', '.join(inside)} (save the one that is meant)"
            )
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not any(map(torch.is_tensor, content.values())):
        raise WeightsError(f"{source}: holds no state dict but {_describe(content)}")
    state = _without_wrappers(content)
    if lightning and len({name.partition(".")[0] for name in state}) == 1:
        # The model is an attribute of the LightningModule.
        state = {name.partition(".")[2]: value for name, value in state.items()}
    _check_state(state, source)
    return state


def check_related(state: Mapping[str, Any], model: Mapping[str, Any], source: str) -> None:
    """Raise WeightsError, without lists, if a state has no name in common with a model's."""
    if state and not state.keys() & model.keys():
        raise WeightsError(
            f"{source}: is of another network: none of its {len(state)} tensors, such as "
            f"{min(state)}, is the model's, which has {len(model)} such as {min(model)}"
        )


def _without_wrappers(content: Mapping[str, Any]) -> dict[str, Any]:
    """The names that the model had before it was compiled, sharded or made data parallel."""
    state = {
        ".".join(part for part in str(name).split(".") if part not in WRAPPERS): value
        for name, value in content.items()
        if name != "n_averaged"  # of swa_utils.AveragedModel
    }
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _check_state(state: Mapping[str, Any], source: str) -> None:
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        kind = type(state[others[0]]).__name__
        raise WeightsError(f"{source}: holds more than tensors: {others[0]} is a {kind} ({ALONE})")
    parts: dict[str, set[str]] = {}
    for name in state:
        first, _, rest = name.partition(".")
        parts.setdefault(first, set()).add(rest)
    first, *more = parts
    # A teacher and a student, say. Networks of a few equal layers have fewer tensors in each.
    if more and len(parts[first]) > 20 and all(parts[other] == parts[first] for other in more):
        raise WeightsError(
            f"{source}: holds several models of one kind: {', '.join(parts)} (save the one that is "
            "meant)"
        )


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    if content.keys() >= {"state", "param_groups"}:
        return "an optimizer's state"
    keys = [str(key) for key in content]
    return f"a dict of {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" if keys else "{}"


def _what_it_is(path: Path, error: str) -> str:
    """Of a file that torch cannot load as tensors and plain values."""
    with path.open("rb") as file:
        start = file.read(32)
    for magic, kind in MAGIC:
        if start.startswith(magic):
            return kind
    if start[8:10] == b'{"':
        return "a safetensors file (must be written by torch.save: load it and save it anew)"
    if "TorchScript" in error:
        return f"a TorchScript archive ({ALONE})"
    try:
        with safe_globals([Namespace]):
            objects = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged archive can raise anything; a file of before torch 1.6 ValueError
        objects = re.findall(r"Unsupported global: GLOBAL (\S+)", error)
    if any(name.startswith("torch.nn.modules.") for name in objects):
        return f"a whole pickled module, of which loading runs code ({ALONE})"
    if objects:
        names = ", ".join(sorted(objects)[:3])
        return f"more than weights: it holds {names}, of which loading runs code ({ALONE})"
    return "not a file of weights (must be a dict of tensors, written whole by torch.save)"
