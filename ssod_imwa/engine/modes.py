"""Training and eval modes that are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule is in its own mode again, also on errors.

    Every submodule's mode is kept, since detectors put parts of themselves (frozen stages) in eval
    mode while they train.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """As `evaluating`, and afterwards the global random generators are as before, too."""
    devices = {x.device for model in models for x in model.parameters() if x.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=sorted(device.index for device in devices)),
            evaluating(*models),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
