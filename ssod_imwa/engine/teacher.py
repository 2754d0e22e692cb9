"""The second model that follows a student: an EMA teacher, a momentum encoder."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

from torch import nn

from ssod_imwa.averaging.ema import Decay, ModelEMA

_Model = TypeVar("_Model", bound=nn.Module)


class Teacher(Generic[_Model]):
    """A copy of the student that becomes the exponential moving average of it.

    With the member's own iteration t, the start B and the decay a, after the optimizer's step t::

        t < B - 1   the teacher stays as it is
        t = B - 1   teacher := student, every parameter and buffer
        t >= B      teacher := a(t) teacher + (1 - a(t)) student

    With B = 0 it follows from the first step on, beginning with the initial weights. It is no
    module, so that a network's state does not contain the one that follows it.

    Args:
        student: what is followed; it is copied.
        decay: a, in [0, 1], or a function of t. 0.9996 averages the last 2500 students or so.
        start: B, own iterations before the teacher is worth anything.
        buffers: floating buffers are averaged like parameters ("ema"), copied ("copy"), or left to
            the teacher's own passes ("skip"), as a momentum encoder's batch norms are.

    Attributes:
        model: the teacher, without gradients, in eval mode. An owner that calls it in training mode
            sets the mode.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(student.weight)
        >>> teacher = Teacher(student, 0.75, start=2)
        >>> _ = nn.init.ones_(student.weight)
        >>> teacher.follow(0)
        >>> teacher.model.weight.item(), teacher.ready(0)
        (0.0, False)
        >>> teacher.follow(1)
        >>> teacher.model.weight.item(), teacher.ready(1)
        (1.0, True)
        >>> _ = nn.init.zeros_(student.weight)
        >>> teacher.follow(2)
        >>> teacher.model.weight.item()
        0.75
    """

    def __init__(
        self,
        student: _Model,
        decay: float | Decay,
        *,
        start: int = 0,
        buffers: str = "ema",
    ) -> None:
        if start < 0:
            raise ValueError(f"start = {start} is not allowed (must be at least 0)")
        self.start = start
        self.model: _Model = copy.deepcopy(student).requires_grad_(False).eval()
        self._ema = ModelEMA(self.model, student, decay, buffers=buffers)

    def follow(self, t: int) -> None:
        """Move towards the student, after the optimizer's step t."""
        if t == self.start - 1:
            self._ema.copy()
        elif t >= self.start:
            self._ema.update(t)

    def ready(self, t: int) -> bool:
        """Whether the teacher is worth evaluating and shipping once iteration t is done."""
        return t >= self.start - 1
