"""What ranks of a distributed run tell each other; with one process every call is local."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a tensor that are widened to 64 bits at a time; bounds the extra memory to 16 MB.
_CHUNK = 1 << 20


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

    Sums run in wrapping 64-bit integers, so the number is the same on every device and in any order
    of summation; one number per tensor travels to the host.
    """
    names, sums = [], []
    for name, tensor in _tensors(models):
        names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        sums.append(_weighted_bits(tensor))
    values = torch.stack([x.to(sums[0].device) for x in sums]).tolist() if sums else []
    text = "\n".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
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


@torch.no_grad()
def average_buffers_(models: Mapping[str, nn.Module]) -> None:
    """Replace floating buffers, such as running statistics, by their mean over ranks.

    The exchange is one float64 message; sums of W equal float32 values divided by W give the value
    back exactly, so constant buffers (FrozenBatchNorm) do not drift.
    """
    if world_size() == 1:
        return
    buffers = [x for m in models.values() for x in m.buffers() if x.is_floating_point()]
    buffers = list(
        {id(x): x for x in buffers}.values()
    )  # a buffer shared by two models counts once
    if not buffers:
        return
    message = torch.cat([x.detach().to(_device(), torch.float64).flatten() for x in buffers])
    dist.all_reduce(message)
    parts = (message / world_size()).split([x.numel() for x in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def _tensors(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, model in models.items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            yield f"{prefix}.{name}", tensor.detach()


def _weighted_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the elements' bits, each times an odd weight that depends on its position."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        position = torch.arange(start, start + part.numel(), device=part.device)
        # 0x9E3779B97F4A7C15, the golden ratio in 64 bits, as a signed number: neighbours get
        # unrelated weights; the last bit set keeps each weight invertible.
        total += (part * ((position * -7046029254386353131) | 1)).sum()
    return total
