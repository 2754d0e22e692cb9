"""Batch norms of averaged models, estimated anew on training batches (fvcore's precise BN)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from ssod_imwa.engine.modes import undisturbed


def build_recomputation(
    batches: Callable[[int], Iterable[Any]],
    *,
    count: int,
    set_train_mode: Callable[[nn.Module], object],
    forward: Callable[[Any, Any], object],
) -> Callable[[Mapping[str, nn.Module]], None]:
    """A function that re-estimates the batch norms of models on a run's first batches.

    Modes and random generators are afterwards as before.

    Args:
        batches: of the run, from a global step on, each with a method `to(device)`.
        count: how many are read.
        set_train_mode: puts those batch norms of a model in eval mode into training mode that are
            to be estimated.
        forward: what a model makes of a batch on its device.
    """

    @torch.no_grad()
    def recompute(models: Mapping[str, nn.Module]) -> None:
        for model in models.values():
            with undisturbed(model):
                set_train_mode(model)
                first = itertools.islice(batches(0), count)
                update_bn_stats(_Forward(model, forward), first, count)

    return recompute


class _Forward(nn.Module):
    """A model as fvcore calls it, with one batch."""

    def __init__(self, model: nn.Module, forward: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.model = model
        self.device = next(model.parameters()).device
        self._forward = forward

    def forward(self, batch: Any) -> object:
        return self._forward(self.model, batch.to(self.device))
