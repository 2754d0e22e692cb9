"""What tensors must fulfill to be averaged: kind, equal shapes, finite values, unchanged bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a tensor that are widened to 64 bits at a time; bounds the extra memory to 16 MB.
_CHUNK = 1 << 20


def check_supported(name: str, tensor: Tensor) -> None:
    """Refuse tensors whose memory is not a plain array of numbers."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    plain = plain and not getattr(tensor, "_is_flat_param", False)  # FSDP1's shards
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or _is_lazy(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} ({tensor.layout}, {tensor.dtype}); sharded "
            "(DTensor, FSDP), sparse, quantized and uninitialized tensors cannot be averaged"
        )
    if tensor.is_floating_point() and tensor.element_size() < 2:
        raise TypeError(f"{name} is {tensor.dtype}; quantized tensors cannot be averaged")


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)


def check_models(modules: Mapping[str, nn.Module]) -> None:
    """Raise TypeError if a parameter or buffer of some modules cannot be averaged."""
    for prefix, module in modules.items():
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            check_supported(f"{prefix}.{name}" if prefix else name, tensor)


def check_separate(state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share elements: an update in place would move these twice.

    Raises:
        ValueError: two tensors overlap in memory, or one is expanded (several of its elements are
            one number in memory).
    """
    spans = []
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.data_ptr() == 0:
            continue
        axes = _axes(tensor)
        if any(size > 1 and stride == 0 for size, stride in axes):
            raise ValueError(
                f"{name} is expanded: several of its elements are one number in memory (register a "
                "copy: .contiguous())"
            )
        count = _reach(tensor)
        start = tensor.data_ptr()
        spans.append((str(tensor.device), start, start + count * tensor.element_size(), name))
    spans.sort()
    for first, second in pairwise(spans):
        if first[0] == second[0] and second[1] < first[2]:
            one, other = state[first[3]], state[second[3]]
            if _share_elements(one, other):
                raise ValueError(
                    f"{first[3]} and {second[3]} overlap in memory, so an update would move their "
                    "common elements twice (register a copy of one, or the same tensor twice)"
                )


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def _reach(tensor: Tensor) -> int:
    """Elements of memory from a tensor's first to behind its last."""
    return sum((size - 1) * stride for size, stride in _axes(tensor)) + 1


def _share_elements(one: Tensor, other: Tensor) -> bool:
    """Whether views of one storage have an element in common; interleaved views have none."""
    if one.dtype != other.dtype:
        return True
    first = min(one.storage_offset(), other.storage_offset())
    ends = [tensor.storage_offset() - first + _reach(tensor) for tensor in (one, other)]
    taken = torch.zeros(max(ends), dtype=torch.bool)
    for tensor in (one, other):
        part = taken.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - first)
        if tensor is other and bool(part.any()):
            return True
        part.fill_(True)
    return False


def check_same(states: Mapping[str, Mapping[str, Tensor]], *, types: bool = True) -> None:
    """Raise ValueError naming the first tensor that differs in presence, shape, type or device.

    Args:
        states: what a message calls a state -> the state; all are compared with the first.
        types: compare types and devices, not only shapes.
    """
    (first, reference), *others = states.items()
    for other, state in others:
        if differing := sorted(reference.keys() ^ state.keys()):
            holder = first if differing[0] in reference else other
            raise ValueError(
                f"{differing[0]} is only in {holder}; {first} and {other} must have equal names"
            )
        for name, tensor in reference.items():
            theirs = state[name]
            mine, its = _describe(tensor, types), _describe(theirs, types)
            if mine != its:
                raise ValueError(
                    f"{name} is {' '.join(map(str, mine))} in {first} but "
                    f"{' '.join(map(str, its))} in {other}; they must be equal"
                )


def _describe(tensor: Tensor, types: bool) -> tuple[object, ...]:
    shape = tuple(tensor.shape)
    return (shape, tensor.dtype, tensor.device) if types else (shape,)


def is_averaged(tensor: Tensor) -> bool:
    """Whether the tensor has a mean; integer and bool tensors must agree instead."""
    return tensor.is_floating_point() or tensor.is_complex()


@torch.no_grad()
def nonfinite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; one wait for the device."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        if is_averaged(tensor) and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    bad: set[str] = set()
    for names in groups.values():
        # The largest magnitude is NaN or infinite exactly if some element is.
        norms = torch._foreach_norm([as_real(state[n]) for n in names], math.inf)
        finite = torch.stack(norms).isfinite().tolist()
        bad.update(name for name, is_finite in zip(names, finite, strict=True) if not is_finite)
    return [name for name in state if name in bad]


@torch.no_grad()
def fingerprints(state: Mapping[str, Tensor]) -> dict[str, int]:
    """A 64-bit number per tensor that changes when any bit of it, or their order, does."""
    # Integer arithmetic wraps around the same way on every device; odd factors keep every bit.
    sums = {}
    for name, tensor in state.items():
        flat = as_real(tensor).contiguous().view(-1)
        bits = flat.view(_INTEGER_OF_SIZE[flat.element_size()])
        total = torch.full((), bits.numel(), dtype=torch.int64, device=tensor.device)
        for number, part in enumerate(bits.split(_CHUNK)):
            first = number * _CHUNK
            index = torch.arange(first + 1, first + 1 + part.numel(), device=tensor.device)
            total += (part.to(torch.int64) * (index * 0x9E3779B97F4A7C1 | 1)).sum()
        sums[name] = total
    groups: dict[torch.device, list[str]] = {}
    for name, total in sums.items():
        groups.setdefault(total.device, []).append(name)
    values: dict[str, int] = {}
    for names in groups.values():
        numbers = torch.stack([sums[n] for n in names]).tolist()
        values.update(zip(names, numbers, strict=True))
    return values


def checksum(state: Mapping[str, Tensor]) -> int:
    """A 64-bit number that depends on every bit of every tensor, and on their names.

    It is the same on every device; one number per tensor travels to the host.
    """
    text = "\n".join(
        f"{name} {tuple(state[name].shape)} {state[name].dtype} {bits}"
        for name, bits in fingerprints(state).items()
    )
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def check_coefficients(coefficients: Sequence[float], members: int) -> list[float]:
    """The coefficients as floats; one per member, none negative, with the sum 1 within 1e-6."""
    values = [float(value) for value in coefficients]
    if len(values) != members:
        raise ValueError(f"{len(values)} coefficients for {members} members; give one for each")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"coefficients {values} are not allowed (each must be finite and >= 0)")
    if abs(math.fsum(values) - 1) > 1e-6:
        raise ValueError(f"coefficients {values} sum to {math.fsum(values)} (must sum to 1)")
    return values


def check_accumulate(accumulate: str) -> None:
    """Raise ValueError unless it is an accumulation type of `average`."""
    if accumulate not in ("float64", "float32"):
        raise ValueError(
            f"accumulate = {accumulate!r} is not allowed (must be 'float64' or 'float32')"
        )


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one with a last axis of 2; any other tensor itself."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
