"""Exchange of models between ranks: every rank gets all members and averages them itself."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.averaging.weights import State, weighted_mean

# Large enough for the bandwidth of a link, small beside a model.
BUCKET_BYTES = 64 << 20
# Tensors of all types share a message; every one begins at a multiple of the widest element.
_ALIGNMENT = 16


@torch.no_grad()
def average_over_ranks(
    state: Mapping[str, Tensor],
    group: Group,
    *,
    run: Group | None = None,
    weights: Sequence[float] | None = None,
    accumulate: str = "float64",
    bucket_bytes: int = BUCKET_BYTES,
) -> State:
    """The mean of the models of a group's ranks: the same bits on every rank, as new tensors.

    The members travel whole, in buckets, and each rank averages them in rank order, so the result
    is that of `average` in one process. An all-reduce would move less for more than two members,
    but neither give equal members back nor be the same for any number of ranks.

    All ranks call this together, in groups of equal size.

    Args:
        state: this rank's tensors; they are not changed.
        group: ranks to average over.
        run: ranks that all fail if one of them does; None is those of the group.
        weights: of the ranks; None for equal ones. Ranks of weight 0 are left out.
        accumulate: see `average`.
        bucket_bytes: bytes of each member in a message; a larger tensor is a bucket of its own.

    Raises:
        ValueError: ranks hold different tensors, or integer tensors that differ.
        RuntimeError: another rank failed. Nothing has changed on any rank.
    """
    run = group if run is None else run
    mean: State = {}
    error: Exception | None = None
    try:
        _check_descriptions(state, group)
    except ValueError as mismatch:  # every rank of the group raises it: none goes on to the buckets
        run.raise_together(mismatch)
    else:
        if weights is None:
            weights = [1.0] * group.size
        for members in _gathered(state, group, bucket_bytes):
            # A rank that fails goes on exchanging: the others wait for its messages.
            if error is None:
                try:
                    mean.update(weighted_mean(members, weights, accumulate=accumulate))
                except Exception as failure:
                    error = failure
        run.raise_together(error)
    return {name: mean[name] for name in state}


def gather_over_ranks(state: Mapping[str, Tensor], group: Group) -> list[State]:
    """The tensors of all ranks of a group, in rank order; for small states that are alike."""
    whole: list[State] = [{} for _ in range(group.size)]
    for members in _gathered(state, group, BUCKET_BYTES):
        for member, part in zip(whole, members, strict=True):
            member.update(part)
    return whole


def gather_nested(state: Any, group: Group, *, chunk_bytes: int = BUCKET_BYTES) -> list[Any]:
    """The nested states of all ranks of a group, in rank order, on its first one; [] elsewhere.

    They travel one after another, as bytes, so that beside the states themselves the first rank
    needs memory for a single one.

    Args:
        state: of this rank; tensors and plain values, as `torch.load(weights_only=True)` takes.
        group: all of its ranks call this together.
        chunk_bytes: bytes of a message.

    Returns:
        The first rank's own state as it is, the others' in CPU memory.
    """
    states = [state] if group.is_main else []
    content = torch.empty(0, dtype=torch.uint8) if group.is_main else _serialized(state)
    for source, size in enumerate(group.all_gather(len(content))):
        if source == 0:
            continue
        travels = content if source == group.rank else torch.empty(size, dtype=torch.uint8)
        for chunk in travels.split(chunk_bytes):
            group.broadcast(chunk, source)
        if group.is_main:
            file = io.BytesIO(travels.numpy().tobytes())
            states.append(torch.load(file, map_location="cpu", weights_only=True))
    return states


def _serialized(state: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _check_descriptions(state: Mapping[str, Tensor], group: Group) -> None:
    mine = {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in state.items()}
    reference, *others = group.all_gather(mine)
    for rank, other in enumerate(others, start=1):
        for name in [*reference, *other]:
            if reference.get(name) != other.get(name):
                raise ValueError(
                    f"{name} is {reference.get(name, 'missing')} on the first rank of the group "
                    f"but {other.get(name, 'missing')} on its rank {rank}; they must be equal"
                )


def _gathered(
    state: Mapping[str, Tensor], group: Group, bucket_bytes: int
) -> Iterator[list[State]]:
    """All ranks' tensors, a bucket at a time."""
    for names in _buckets(state, bucket_bytes):
        tensors = [state[name] for name in names]
        sizes = [_padded(tensor) for tensor in tensors]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        for view, tensor in zip(_views(message, tensors, sizes), tensors, strict=True):
            view.copy_(tensor)
        messages = group.gather_tensors(message)
        yield [dict(zip(names, _views(m, tensors, sizes), strict=True)) for m in messages]


def _buckets(state: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in state.items():
        by_device.setdefault(tensor.device, []).append(name)
    for names in by_device.values():
        bucket: list[str] = []
        size = 0
        for name in names:
            if bucket and size + _padded(state[name]) > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += _padded(state[name])
        yield bucket


def _padded(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT


def _views(message: Tensor, like: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The message's bytes as tensors of these types and shapes."""
    return [
        part[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(message.split(sizes), like, strict=True)
    ]
