"""Multi-tensor arithmetic of averages: wide sums and running means, a cache's size at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ssod_imwa.averaging.checks import as_real

# Elements summed at a time, so that the wide scratch of an average stays in the cache and small.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ELSEWHERE = 1 << 20


def shares(weights: Sequence[float]) -> list[float | None]:
    """Weight of each member in the running mean up to it; None for each if all are equal."""
    if len(set(weights)) == 1:
        return [None] * len(weights)
    return [
        weight / so_far
        for weight, so_far in zip(weights, itertools.accumulate(weights), strict=True)
    ]


def wide(dtype: torch.dtype, accumulate: str) -> torch.dtype:
    """Type in which tensors of a type are summed."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return dtype
    double = accumulate == "float64" or dtype in (torch.float64, torch.complex128)
    if dtype.is_complex:
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


def _summed(dtype: torch.dtype, share: float | None, accumulate: str) -> bool:
    # A float64 sum of narrower numbers is exact in practice; any other sum, divided by M = 3, would
    # not give three identical members back, and a running mean does.
    return share is None and accumulate == "float64" and dtype != torch.float64


def accumulate_(
    totals: list[Tensor],
    values: list[Tensor],
    number: int,
    share: float | None,
    accumulate: str,
) -> None:
    """Add the member of this number to the sum or running mean."""
    if number == 0:
        torch._foreach_copy_(totals, values)
        return
    dtype = values[0].dtype
    if dtype != totals[0].dtype:
        widened = scratch(values, totals[0].dtype)
        torch._foreach_copy_(widened, values)
        values = widened
    if _summed(dtype, share, accumulate):
        torch._foreach_add_(totals, values)
    else:
        torch._foreach_lerp_(totals, values, 1 / (number + 1) if share is None else share)


def write_(
    outputs: list[Tensor],
    totals: list[Tensor],
    members: int,
    share: float | None,
    accumulate: str,
) -> None:
    """Turn totals, which it changes, into the mean."""
    if members > 1 and _summed(outputs[0].dtype, share, accumulate):
        # By a tensor: a division by a number may be done as a multiplication by its reciprocal.
        torch._foreach_div_(totals, totals[0].new_full((), members))
    torch._foreach_copy_(outputs, totals)


def scratch(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialized tensors of these shapes, in one piece of memory."""
    sizes = [tensor.numel() for tensor in like]
    flat = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    parts = flat.split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def batches(rows: Iterable[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Cut rows of equally shaped tensors into batches for multi-tensor calls.

    Yields columns: the first tensors of the batch's rows, the second ones, ... Within a column all
    have one device and type. Complex tensors become real ones, empty ones are left out.
    """
    groups: dict[tuple[object, ...], list[list[Tensor]]] = {}
    for row in rows:
        if row[0].numel():
            pieces = _flat([as_real(tensor) for tensor in row])
            groups.setdefault(tuple((t.device, t.dtype) for t in pieces), []).append(pieces)
    for group in groups.values():
        limit = _CHUNK.get(group[0][0].device.type, _CHUNK_ELSEWHERE)
        batch: list[Sequence[Tensor]] = []
        size = 0
        for row in group:
            for piece in zip(*[tensor.split(limit) for tensor in row], strict=True):
                if size and size + piece[0].numel() > limit:
                    yield [list(column) for column in zip(*batch, strict=True)]
                    batch, size = [], 0
                batch.append(piece)
                size += piece[0].numel()
        yield [list(column) for column in zip(*batch, strict=True)]


def _flat(row: list[Tensor]) -> list[Tensor]:
    """One-dimensional views in a common order of elements; copies would not be written through."""
    order = sorted(range(row[0].ndim), key=row[0].stride().__getitem__, reverse=True)
    permuted = [tensor.permute(order) for tensor in row]
    if all(tensor.is_contiguous() for tensor in permuted):
        return [tensor.view(-1) for tensor in permuted]
    return row
