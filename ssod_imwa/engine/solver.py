"""Optimizers, learning-rate schedules and gradient clipping, from plain arguments."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, synchronized and instance normalization
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    weight_decay_norm: float,
    beta2: float = 0.999,
    nesterov: bool = False,
    decay_biases: bool = True,
    lr_factor: Callable[[str], float] = lambda name: 1.0,
    groups: list[dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of a model, each of them once.

    Every group has an `initial_lr`, which `LRHook` multiplies.

    Args:
        model: parameters with `requires_grad` False are left out.
        name: "SGD" or "AdamW".
        lr: learning rate after warm-up.
        momentum: SGD's momentum; AdamW's first beta.
        weight_decay: for all parameters but those of normalization layers.
        weight_decay_norm: for scale and shift of normalization layers.
        beta2: AdamW's second beta.
        nesterov: SGD with Nesterov's momentum, which needs one above 0.
        decay_biases: whether biases of other layers have `weight_decay`; without they have none.
        lr_factor: name of a parameter -> factor of its learning rate.
        groups: of parameters with `initial_lr` and `weight_decay`, instead of those by the three
            arguments before.

    Raises:
        ValueError: the name is unknown, `nesterov` does not go with it or with the momentum, or the
            model has nothing to train.
    """
    if nesterov and not (name == "SGD" and momentum > 0):
        raise ValueError(
            f"nesterov = True is not allowed with {name} and momentum = {momentum} (must be SGD "
            "with a momentum above 0)"
        )
    decays = {
        "weight": weight_decay,
        "norm": weight_decay_norm,
        "bias": weight_decay if decay_biases else 0.0,
    }
    if groups is None:
        split = _split_parameters(model, lr_factor, biases_apart=not decay_biases)
        groups = [
            {"params": params, "weight_decay": decays[kind], "initial_lr": lr * factor}
            for (kind, factor), params in split.items()
        ]
    if not groups:
        raise ValueError("the model has no parameter with requires_grad (nothing to train)")
    # fused: on a CPU, where the default is a loop in Python, 2 (SGD) to 4 times as fast.
    if name == "SGD":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
        sgd.register_step_pre_hook(_fill_buffers)
        return sgd
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, beta2), fused=True)
    raise ValueError(f"optimizer {name!r} is not known (choose SGD or AdamW)")


def _fill_buffers(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Give parameters that have no momentum yet a momentum of 0.

    The fused kernel takes momenta of all parameters or of none, and where a loss scale overflows in
    the first step it keeps those that it had allocated and not written. From 0 the first step is
    the one that it takes without: 0 times the momentum plus the gradient.
    """
    for group in optimizer.param_groups:
        if group["momentum"] == 0:
            continue
        moved = [p for p in group["params"] if p.grad is not None]
        for parameter in moved:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _split_parameters(
    model: nn.Module, lr_factor: Callable[[str], float], *, biases_apart: bool
) -> dict[tuple[str, float], list[nn.Parameter]]:
    """Trainable parameters by kind ("weight", "norm", and "bias" if they are apart) and factor."""
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                kind = "norm" if isinstance(module, _NORMS) else "weight"
                if biases_apart and kind == "weight" and name.rpartition(".")[2] == "bias":
                    kind = "bias"
                groups.setdefault((kind, lr_factor(name)), []).append(parameter)
    # Layers before norms, as always: the order is part of a checkpoint.
    return dict(sorted(groups.items(), key=lambda item: item[0][0] == "norm"))


def lr_multiplier(
    name: str,
    *,
    max_iter: int,
    steps: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_iters: int = 0,
    warmup_factor: float = 0.001,
    cosine_cycles: float = 0.21875,
) -> Callable[[int], float]:
    """The factor of the learning rate at a member's own iteration t, as detectron2 defines it.

    The warm-up is a straight line from `warmup_factor` at t = 0 to the schedule's own value at
    t = `warmup_iters`. detectron2's cosine begins at t = 0, below the warm-up; that of MAE, LiVT
    and PaCo begins where the warm-up ends; FixMatch's has no end at 0 (arXiv 2001.07685, 2.3).

    Args:
        name: "WarmupMultiStepLR", "WarmupCosineLR" (half a cosine from 1 at t = 0 to 0 at T),
            "WarmupThenCosineLR" (from 1 at `warmup_iters` to 0 at T), or "WarmupPartOfCosineLR",
            cos(2π c t / T), which ends at cos(2π c).
        max_iter: T, iterations of one member.
        steps: own iterations from which the rate is `gamma` times smaller, ascending.
        gamma: factor of each step.
        warmup_iters: length of the warm-up in iterations, 0 for none.
        warmup_factor: factor at t = 0.
        cosine_cycles: c of "WarmupPartOfCosineLR" in 0..0.25; FixMatch's 7π/16 is 7/32.

    Raises:
        ValueError: the name is unknown, the steps are not ascending, or the rate would fall below
            0.

    Example:
        >>> multiplier = lr_multiplier("WarmupMultiStepLR", max_iter=100, steps=(60,),
        ...                            warmup_iters=10, warmup_factor=0.1)
        >>> [round(multiplier(t), 3) for t in (0, 5, 10, 59, 60)]
        [0.1, 0.55, 1.0, 1.0, 0.1]
    """
    if list(steps) != sorted(steps):
        raise ValueError(f"steps = {tuple(steps)} is not allowed (must be ascending)")
    # A warm-up longer than the run is cut, so its line ends where the schedule does.
    warmup = min(warmup_iters, max_iter)

    if name == "WarmupMultiStepLR":

        def schedule(t: int) -> float:
            return gamma ** bisect_right(steps, t)

    elif name in ("WarmupCosineLR", "WarmupThenCosineLR"):
        start = warmup if name == "WarmupThenCosineLR" else 0
        # A run that is all warm-up has no cosine, whose first value is where the line ends.
        length = max(max_iter - start, 1)

        def schedule(t: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * max(t - start, 0) / length))

    elif name == "WarmupPartOfCosineLR":
        if not 0 <= cosine_cycles <= 0.25:
            raise ValueError(f"cosine_cycles = {cosine_cycles} is not allowed (must be 0..0.25)")

        def schedule(t: int) -> float:
            return math.cos(2 * math.pi * cosine_cycles * t / max_iter)

    else:
        raise ValueError(
            f"schedule {name!r} is not known (choose WarmupMultiStepLR, WarmupCosineLR, "
            "WarmupThenCosineLR or WarmupPartOfCosineLR)"
        )

    def multiplier(t: int) -> float:
        if t >= warmup:
            return schedule(t)
        # detectron2 scales the start, too; its schedules begin at 1 unless a step is at 0.
        first, last = warmup_factor * schedule(0), schedule(warmup)
        return first + (last - first) * t / warmup

    return multiplier


def gradient_clipper(clip_type: str, value: float) -> Callable[[Sequence[nn.Parameter]], object]:
    """A function that limits the gradients of parameters in place.

    Args:
        clip_type: "norm" bounds the L2 norm of all gradients together (detectron2's key of this
            name bounds each parameter's norm by itself); "value" bounds every element.
        value: the bound, above 0.

    Raises:
        ValueError: an argument is not allowed.
    """
    if not value > 0:
        raise ValueError(f"clip value = {value} is not allowed (must be above 0)")
    if clip_type == "norm":
        return lambda parameters: nn.utils.clip_grad_norm_(parameters, value)
    if clip_type == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, value)
    raise ValueError(f"clip type {clip_type!r} is not known (choose norm or value)")
