"""What a training method has to offer to be trained, wrapped by IMWA, resumed and evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.ranks import Ranks


class Method(ABC):
    """A training method, the IMWA paper's 𝒜(θ, ω, 𝒟, ℋ, T).

    The trainer calls, for each of a member's own iterations t = 0..T-1::

        method.set_train_mode()
        losses = method.losses(batch, t)
        sum(losses that are named loss...).backward()
        optimizer.step()
        method.after_step(t)

    Everything that changes with time (burn-in, ramp-ups, EMA decay) follows t, never the global
    step, so that a member under IMWA sees the same method as a plain run does.

    Attributes:
        reads: the streams that `losses` reads and the views it takes of each, by which a run's
            batches are made. On the class it is all that the method may read, on an instance what
            it reads with its settings.
        student: the model that gradients train.
        teacher: its exponential moving average, or None if the method has none.
        parallel_student: what `losses` calls: the student, or its wrapper (compiled,
            DistributedDataParallel).
        ranks: who else trains; those of `ranks.batch` have the other parts of every batch.
    """

    reads: Mapping[str, tuple[str, ...]]

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        self.student = student
        self.teacher = teacher
        self.parallel_student: nn.Module = student
        self.ranks = Ranks.alone()
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def set_train_mode(self) -> None:
        """Put the student into the mode in which it trains; frozen parts may stay in eval mode."""
        self.student.train()

    @abstractmethod
    def losses(self, batch: Any, t: int) -> dict[str, torch.Tensor]:
        """Scalars of one batch: those named `loss...` are summed, the others are only recorded."""

    def after_step(self, t: int) -> None:  # noqa: B027  (most methods without a teacher need none)
        """Update what follows the student, such as the teacher, after the optimizer's step t."""

    def teacher_ready(self, t: int) -> bool:
        """Whether the teacher is worth evaluating once iteration t is done."""
        return self.teacher is not None

    def models(self) -> dict[str, nn.Module]:
        """The models that IMWA averages, by name: "student", "teacher", and what else moves."""
        models = {"student": self.student}
        return models if self.teacher is None else {**models, "teacher": self.teacher}

    def inference_model(self, t: int) -> nn.Module:
        """The model to evaluate and ship once iteration t is done."""
        return self.teacher if self.teacher is not None and self.teacher_ready(t) else self.student

    def state_dict(self) -> dict[str, Any]:
        """What a member owns beyond weights: queues, prototypes, distribution estimates."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise KeyError(f"{type(self).__name__} has no state, but was given {sorted(state)}")
