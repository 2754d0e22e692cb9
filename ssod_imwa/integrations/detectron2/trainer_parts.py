"""What the hook reaches into in a detectron2 trainer: its clock and its generators."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.engine import TrainerBase
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def own_clock(trainer: TrainerBase, run_step: str, schedule: EpisodeSchedule) -> Iterator[None]:
    """Show the member's own iteration and T as `trainer.iter` and `max_iter` while a step runs.

    Metrics that the step records under its iteration go to the global step, since detectron2's
    writers drop what is not later than the last record.
    """
    step = getattr(trainer, run_step)
    storage = trainer.storage
    put_scalar = storage.put_scalar
    stepping = False

    def run_on_own_clock() -> None:
        nonlocal stepping
        global_step, length = trainer.iter, trainer.max_iter
        trainer.iter, trainer.max_iter = schedule.position(global_step).t, schedule.iterations
        stepping = True
        try:
            step()
        finally:
            trainer.iter, trainer.max_iter, stepping = global_step, length, False

    def put_at_global_step(
        name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        # SimpleTrainer may write a step's metrics from another thread, after the step.
        in_step = stepping or threading.current_thread() is not threading.main_thread()
        if cur_iter is not None and in_step:
            position = schedule.position(storage.iter)
            cur_iter = position.global_step + cur_iter - position.t
        put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    setattr(trainer, run_step, run_on_own_clock)
    storage.put_scalar = put_at_global_step
    try:
        yield
    finally:
        delattr(trainer, run_step)
        del storage.put_scalar


def generator_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, loadable with weights_only."""
    numpy = np.random.get_state(legacy=False)
    words, position = numpy["state"]["key"], numpy["state"]["pos"]
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [
            numpy["bit_generator"],
            torch.from_numpy(words.astype(np.int64)),
            position,
            numpy["has_gauss"],
            numpy["gauss"],
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Continue where `generator_states` was taken."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, words, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
