"""Named tensors of models: collecting, copying, checking and averaging them.

A `State` maps names such as "student.conv1.weight" to tensors. Pairing is always by name, and a
tensor with two names (tied weights, a layer shared by student and teacher) occurs once: an in-place
update that met it once per name would be applied twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ssod_imwa.averaging.arithmetic import (
    accumulate_,
    batches,
    scratch,
    shares,
    wide,
    write_,
)
from ssod_imwa.averaging.checks import (
    check_accumulate,
    check_coefficients,
    check_same,
    check_separate,
    check_supported,
    is_averaged,
)

State = dict[str, Tensor]

# Counters of BatchNorm; members may disagree about them, and the largest is taken.
COUNTER = "num_batches_tracked"


def named_state(modules: Mapping[str, nn.Module], *, frozen: Collection[str] = ()) -> State:
    """The live parameters and buffers of several modules, each tensor once.

    Args:
        modules: name of a module -> module, not wrapped for data parallelism.
        frozen: parameters to leave out, see `frozen_parameters`.

    Returns:
        "<module>.<parameter or buffer>" -> the tensor itself, non-persistent buffers included.

    Raises:
        TypeError: a tensor is sharded, sparse, quantized or not initialized.
        ValueError: tensors overlap in memory without being the same.

    Example:
        >>> student = nn.Linear(2, 1)
        >>> sorted(named_state({"student": student, "teacher": nn.BatchNorm1d(1, affine=False)}))
        ... # doctest: +NORMALIZE_WHITESPACE
        ['student.bias', 'student.weight', 'teacher.num_batches_tracked', 'teacher.running_mean',
         'teacher.running_var']
    """
    state: State = {}
    seen: set[object] = set()
    for prefix, module in modules.items():
        parameters = (item for item in module.named_parameters() if item[0] not in frozen)
        for name, tensor in chain(parameters, module.named_buffers()):
            check_supported(f"{prefix}.{name}", tensor)
            identity = tensor_identity(tensor)
            if identity not in seen:
                seen.add(identity)
                state[f"{prefix}.{name}"] = tensor.detach()
    check_separate(state)
    return state


def frozen_parameters(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names, without the module's, of the parameters that no module trains.

    An EMA teacher never requires gradients, so its parameter counts as frozen only if the student's
    of the same name is frozen, too.
    """
    named = [
        item
        for module in modules.values()
        for item in module.named_parameters(remove_duplicate=False)
    ]
    return {name for name, _ in named} - {name for name, p in named if p.requires_grad}


def tensor_identity(tensor: Tensor) -> object:
    """What two names of one tensor have in common."""
    # By memory, not by object: a registered `weight.detach()` is the same tensor to an update.
    if tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def snapshot(
    state: Mapping[str, Tensor], *, device: torch.device | str | None = None, pin: bool = False
) -> State:
    """Clones of the tensors, on their own device or on another.

    Args:
        state: tensors to copy.
        device: where the clones live; None keeps each tensor's device.
        pin: page-locked host memory, for copies to and from a GPU.
    """
    copies = {
        name: torch.empty_like(tensor, device=device, pin_memory=pin, requires_grad=False)
        for name, tensor in state.items()
    }
    copy_(copies, state)
    return copies


@torch.no_grad()
def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy every tensor of `source` into the one of that name in `target`, in place.

    Types and devices may differ. Returns when the copies can be relied on by the host, too.

    Raises:
        ValueError: names or shapes differ, or tensors of the target overlap in memory.
    """
    check_same({"target": target, "source": source}, types=False)
    # Names of one tensor are no overlap: it is copied twice and moved once.
    by_identity = {tensor_identity(tensor): name for name, tensor in target.items()}
    check_separate({name: target[name] for name in by_identity.values()})
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in target.items():
        other = source[name]
        key = (tensor.device, tensor.dtype, other.device, other.dtype)
        groups.setdefault(key, []).append(name)
    devices = set()
    for names in groups.values():
        into, values = [target[n] for n in names], [source[n] for n in names]
        crosses = into[0].device != values[0].device
        torch._foreach_copy_(into, values, non_blocking=crosses)
        if crosses:
            devices |= {into[0].device, values[0].device}
    for device in devices:
        if device.type == "cuda":  # one wait for all asynchronous copies
            torch.cuda.current_stream(device).synchronize()


def average(
    states: Sequence[Mapping[str, Tensor]],
    *,
    coefficients: Sequence[float] | None = None,
    accumulate: str = "float64",
) -> State:
    """The mean of several models' tensors, as new tensors (IMWA eq. 1, 4, 9).

    With equal coefficients and "float64" the mean is the correctly rounded one up to double
    rounding: identical members give themselves bit for bit and the order of members does not
    matter. Otherwise a running mean is formed, which also gives identical members back, but for
    the sign of a zero.
    Integer and bool tensors must agree, but of BatchNorm's counters the largest is taken.

    Args:
        states: the members, with equal names, shapes, types and devices.
        coefficients: weight of each member, summing to 1; None is 1/M each.
        accumulate: "float64", or "float32": a running mean in float32 (float64 for float64 tensors)
            that turns equal infinities into NaN.

    Raises:
        ValueError: members differ in what they hold, or coefficients are wrong.

    Example:
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}])
        {'w': tensor([2.5000])}
    """
    if not states:
        raise ValueError("no member to average (give at least one)")
    if coefficients is None:
        weights = [1.0] * len(states)
    else:
        weights = check_coefficients(coefficients, len(states))
    return weighted_mean(states, weights, accumulate=accumulate)


@torch.no_grad()
def weighted_mean(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], *, accumulate: str = "float64"
) -> State:
    """As `average`, with weights that need not sum to 1; members of weight 0 are only compared."""
    check_accumulate(accumulate)
    check_same({f"member {i}": state for i, state in enumerate(states)})
    states = [state for state, weight in zip(states, weights, strict=True) if weight > 0]
    weights = [weight for weight in weights if weight > 0]
    averaged = [name for name, tensor in states[0].items() if is_averaged(tensor)]
    result = _agreed([{n: t for n, t in s.items() if not is_averaged(t)} for s in states])
    result |= {name: torch.empty_like(states[0][name]) for name in averaged}
    running = shares(weights)
    rows = [[result[name], *(state[name] for state in states)] for name in averaged]
    for outputs, *members in batches(rows):
        totals = scratch(outputs, wide(outputs[0].dtype, accumulate))
        for number, (values, share) in enumerate(zip(members, running, strict=True)):
            accumulate_(totals, values, number, share, accumulate)
        write_(outputs, totals, len(members), running[-1], accumulate)
    return {name: result[name] for name in states[0]}


class RunningAverage:
    """The mean of members that are seen one at a time: the same bits as `average`.

    It holds one sum of the size of a model (twice that in "float64"), however many members.

    Args:
        accumulate: as in `average`.
        uniform: whether all members have the same weight.

    Attributes:
        count: members added.

    Example:
        >>> mean = RunningAverage()
        >>> for value in (1.0, 4.0):
        ...     mean.add({"w": torch.tensor([value])})
        >>> mean.result()
        {'w': tensor([2.5000])}
    """

    def __init__(self, *, accumulate: str = "float64", uniform: bool = True) -> None:
        check_accumulate(accumulate)
        self.accumulate = accumulate
        self.uniform = uniform
        self.count = 0
        self._weight = 0.0
        self._totals: State = {}
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def add(self, state: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """Add a member; the weights need not sum to 1.

        Raises:
            ValueError: names, shapes, types or devices are not those of the first member, or
                integer tensors disagree; the mean is then as before.
        """
        if self.count == 0:
            self._dtypes = {n: t.dtype for n, t in state.items()}
            self._totals = {
                n: torch.empty_like(t, dtype=wide(t.dtype, self.accumulate))
                for n, t in state.items()
            }
        self._check(state)
        exact, share = self._prepare(state, weight)
        copy_({n: self._totals[n] for n in exact}, exact)
        rows = [[self._totals[n], t] for n, t in state.items() if n not in exact]
        for totals, values in batches(rows):
            accumulate_(totals, values, self.count, share, self.accumulate)
        self.count += 1
        self._weight += weight

    def _prepare(self, state: Mapping[str, Tensor], weight: float) -> tuple[State, float | None]:
        """The tensors without a mean as they become with a member, and its share of the mean."""
        if weight <= 0 or (self.uniform and weight != 1):
            rule = "1, or give uniform=False" if self.uniform else "positive"
            raise ValueError(f"weight = {weight} is not allowed (must be {rule})")
        exact = {n: t for n, t in state.items() if not is_averaged(t)}
        held = [{n: self._totals[n] for n in exact}] if self.count else []
        share = None if self.uniform else weight / (self._weight + weight)
        return _agreed([*held, exact]), share

    def _check(self, state: Mapping[str, Tensor]) -> None:
        # Totals are wide; the comparison is with the first member's types.
        check_same({"the first member": self._totals, "this member": state}, types=False)
        for name, dtype in self._dtypes.items():
            if state[name].dtype != dtype or state[name].device != self._totals[name].device:
                raise ValueError(
                    f"{name} is {state[name].dtype} on {state[name].device} but was {dtype} on "
                    f"{self._totals[name].device} in the first member; they must be equal"
                )

    @torch.no_grad()
    def result(self, *, last: Mapping[str, Tensor] | None = None, weight: float = 1.0) -> State:
        """The mean of the members added so far and of one more, as new tensors.

        Args:
            last: counted as if it were added, but the running mean stays as it is.
            weight: of `last`.
        """
        if last is None:
            return self._divided(self._totals, self.count)
        if self.count == 0:
            return average([last], accumulate=self.accumulate)
        self._check(last)
        exact, share = self._prepare(last, weight)
        result = {n: torch.empty_like(t) for n, t in last.items()}
        copy_({n: result[n] for n in exact}, exact)
        rows = [[result[n], self._totals[n], t] for n, t in last.items() if n not in exact]
        for outputs, totals, values in batches(rows):
            sums = scratch(totals, totals[0].dtype)
            torch._foreach_copy_(sums, totals)
            accumulate_(sums, values, self.count, share, self.accumulate)
            write_(outputs, sums, self.count + 1, share, self.accumulate)
        return result

    def _divided(self, totals: State, count: int) -> State:
        if count == 0:
            raise ValueError("no member to average (add at least one)")
        result = {n: torch.empty_like(t, dtype=self._dtypes[n]) for n, t in totals.items()}
        exact = {n: t for n, t in totals.items() if not is_averaged(t)}
        copy_({n: result[n] for n in exact}, exact)
        share = None if self.uniform else 1.0
        rows = [[result[n], t] for n, t in totals.items() if n not in exact]
        for outputs, columns in batches(rows):
            sums = scratch(columns, columns[0].dtype)
            torch._foreach_copy_(sums, columns)
            write_(outputs, sums, count, share, self.accumulate)
        return result

    def state_dict(self) -> dict[str, object]:
        """The sums (not copied: serialize them before the next `add`) and the counts."""
        return {
            "accumulate": self.accumulate,
            "uniform": self.uniform,
            "count": self.count,
            "weight": self._weight,
            "totals": dict(self._totals),
            "dtypes": dict(self._dtypes),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], *, like: Mapping[str, Tensor] | None = None
    ) -> None:
        """Continue where `state_dict` was taken; the sums move to the devices of `like`."""
        for name in ("accumulate", "uniform"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but was {state[name]!r} when saved"
                )
        self.count, self._weight = state["count"], state["weight"]
        self._dtypes = dict(state["dtypes"])
        self._totals = {
            name: total.to(total.device if like is None else like[name].device, copy=True)
            for name, total in state["totals"].items()
        }


def _agreed(states: Sequence[Mapping[str, Tensor]]) -> State:
    """The tensors that members must share, BatchNorm's counters at their maximum, cloned."""
    result = snapshot(states[0])
    differs: list[Tensor] = []
    pairs = []
    for member, state in enumerate(states[1:], start=1):
        for name, tensor in state.items():
            if name.rpartition(".")[2] == COUNTER:
                torch.maximum(result[name], tensor, out=result[name])
            else:
                pairs.append((member, name))
                differs.append((result[name] != tensor).any())
    for (member, name), unequal in zip(pairs, _to_host(differs), strict=True):
        if unequal:
            mine, its = states[0][name].reshape(-1), states[member][name].reshape(-1)
            at = int((mine != its).nonzero()[0])
            raise ValueError(
                f"{name} has no mean and differs between members: {mine[at].item()} and "
                f"{its[at].item()} (element {at}); make it equal, or keep it out of the model"
            )
    return result


def _to_host(flags: list[Tensor]) -> list[bool]:
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
