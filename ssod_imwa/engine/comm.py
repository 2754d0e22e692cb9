"""What ranks of a distributed run tell each other; with one process every call is local."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ssod_imwa.averaging.checks import fingerprints
from ssod_imwa.averaging.exchange import average_over_ranks
from ssod_imwa.averaging.weights import copy_, named_state


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 for a run of one process."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _device() -> torch.device:
    """Where small messages have to be: NCCL only moves GPU memory."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_true(flag: torch.Tensor | bool) -> bool:
    """Whether the flag is true on every rank; all ranks must ask in the same order."""
    if world_size() == 1:
        return bool(flag)
    # copy: the reduction is in place and the flag is the caller's.
    message = torch.as_tensor(flag).to(device=_device(), dtype=torch.int32, copy=True)
    dist.all_reduce(message, op=dist.ReduceOp.MIN)
    return bool(message)


def any_true(flag: torch.Tensor | bool) -> bool:
    """Whether the flag is true on at least one rank."""
    return not all_true(torch.logical_not(torch.as_tensor(flag)))


def all_gather(value: Any) -> list[Any]:
    """The picklable values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def checksum(models: Mapping[str, nn.Module]) -> int:
    """A 64-bit number that depends on every bit of every parameter and buffer, and on their names.

    It is the same on every device; one number per tensor travels to the host.
    """
    state = named_state(models)
    text = "\n".join(
        f"{name} {tuple(state[name].shape)} {state[name].dtype} {bits}"
        for name, bits in fingerprints(state).items()
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def assert_equal_on_all_ranks(value: Any, what: str) -> None:
    """Raise on every rank when a picklable value differs between ranks.

    Raises:
        RuntimeError: with the values that were found and their ranks.
    """
    values = all_gather(value)
    if any(other != values[0] for other in values):
        found = ", ".join(f"rank {i}: {other!r}" for i, other in enumerate(values))
        raise RuntimeError(f"{what} must be equal on all ranks, but is not ({found})")


def average_buffers_(models: Mapping[str, nn.Module]) -> None:
    """Replace floating buffers, such as running statistics, by their mean over ranks.

    Equal buffers keep their bits, so constant ones (FrozenBatchNorm) do not drift.
    """
    if world_size() == 1:
        return
    parameters = {f"{k}.{n}" for k, model in models.items() for n, _ in model.named_parameters()}
    buffers = {
        name: tensor
        for name, tensor in named_state(models).items()
        if name not in parameters and tensor.is_floating_point()
    }
    copy_(buffers, average_over_ranks(buffers))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, (ranks * n, ...), in rank order and without gradients.

    Args:
        rows: (n, ...), of equal shape on every rank; one process gets them back as they are.
    """
    if world_size() == 1:
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
