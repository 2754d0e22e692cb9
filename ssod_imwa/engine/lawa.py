"""An average of a run's last averages, beside the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ssod_imwa.averaging.lawa import LatestAverages, averaged_tensors
from ssod_imwa.averaging.weights import State, copy_, named_state, snapshot
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import UserError


class LawaHook(HookBase):
    """Keeps the evaluated models of the last k ends of episodes and averages them after the last.

    Belongs after IMWAHook and before the checkpoint. Training sees nothing of it. A teacher counts
    from when it is worth evaluating.

    Args:
        k: see `LatestAverages`.
        accumulate: see `average`.
        recompute: given models, re-estimates their batch norms, on all ranks alike; None leaves the
            mean of their statistics.
    """

    is_of_run = True

    def __init__(
        self,
        k: int,
        *,
        accumulate: str = "float64",
        recompute: Callable[[Mapping[str, nn.Module]], object] | None = None,
    ) -> None:
        self._latest = LatestAverages(k, accumulate=accumulate)
        self._recompute = recompute
        self._mean: dict[str, State] = {}
        self._saved_k: int | None = None

    @property
    def name(self) -> str:
        return "lawa"

    def before_train(self) -> None:
        trainer = self.trainer
        if trainer.start_iter < trainer.max_iter:
            return
        if self._saved_k not in (None, self._latest.k):
            raise UserError(
                f"IMWA.LAWA = {self._latest.k} is not allowed: the run has ended with "
                f"{self._saved_k}, and that mean is written"
            )
        # Nothing but an evaluation is left, of the last average alone if none was kept before it.
        if self._latest.is_empty:
            last = trainer.schedule.position(trainer.max_iter - 1)
            self._latest.add(trainer.method.evaluated_models(last.t))
        self._average()

    def after_step(self) -> None:
        position = self.trainer.position
        if position.ends_episode:
            self._latest.add(self.trainer.method.evaluated_models(position.t))
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._average()

    def _average(self) -> None:
        self._mean = self._latest.mean()
        if self._recompute is None:
            return
        method = self.trainer.method
        models = {name: method.models()[name] for name in self._mean}
        # Some methods count in training mode what their losses are divided by.
        state = copy.deepcopy(method.state_dict())
        with self.weights():
            self._recompute(models)
            tensors = averaged_tensors(models)
            mean = {name: snapshot(tensors[name], device="cpu") for name in models}
        self._mean = mean
        method.load_state_dict(state)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, at the end of the run, the live models are the average; then as they were."""
        models = {name: self.trainer.method.models()[name] for name in self._mean}
        trained = {name: snapshot(named_state({"": model})) for name, model in models.items()}
        try:
            for name, tensors in averaged_tensors(models).items():
                copy_(tensors, self._mean[name])
            yield
        finally:
            # Looked up again: whoever re-estimates statistics may put others in their place.
            for name, model in models.items():
                copy_(named_state({"": model}), trained[name])

    def state_dict(self) -> dict[str, Any]:
        return {**self._latest.state_dict(), "k": self._latest.k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # a resume may begin with it
            self._saved_k = state.get("k")
            self._latest.load_state_dict(state)
