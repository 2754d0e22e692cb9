"""What tensors must fulfill to be averaged: kind, equal shapes, finite values, unchanged bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a tensor that are widened to 64 bits at a time; bounds the extra memory to 16 MB.
_CHUNK = 1 << 20


def check_supported(name: str, tensor: Tensor) -> None:
    """Refuse tensors whose memory is not a plain array of numbers."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or _is_lazy(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__} ({tensor.layout}, {tensor.dtype}); sharded "
            "(DTensor, FSDP), sparse, quantized and uninitialized tensors cannot be averaged"
        )
    if tensor.is_floating_point() and tensor.element_size() < 2:
        raise TypeError(f"{name} is {tensor.dtype}; quantized tensors cannot be averaged")


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)


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
