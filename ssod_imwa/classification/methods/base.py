"""What the methods of classification have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ssod_imwa.averaging.ema import warmup_decay
from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.config.options import Options, option
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.teacher import Teacher


class TrainingNetwork(nn.Module, ABC):
    """A classifier together with what only its training needs: projection heads, more classifiers.

    In eval mode it is the classifier: images (B, 3, H, W) to logits (B, C). In training mode it
    returns what the method's losses are computed from, all in one call, because
    DistributedDataParallel wants one forward pass before a backward pass.

    Args:
        deployed: the classifier, which is what is left of the network when it is exported.
    """

    def __init__(self, deployed: nn.Module) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.outputs(*inputs) if self.training else self.deployed(*inputs)

    @abstractmethod
    def outputs(self, *inputs: torch.Tensor) -> Any:
        """What the losses need."""


def deployed(network: nn.Module) -> nn.Module:
    """The classifier in a method's network, without what only training needs."""
    return network.deployed if isinstance(network, TrainingNetwork) else network


@torch.no_grad()
def train_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Percent of the images (B,) that logits (B, C) get right.

    Example:
        >>> train_accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
        tensor(50.)
    """
    return 100 * (logits.argmax(1) == labels).float().mean()


@dataclass(frozen=True)
class EMAOptions(Options):
    """A teacher of any method."""

    ema_decay: float = option(
        0.0,
        "decay of an EMA of the weights, which is then evaluated and shipped; 0 keeps none",
        low=0,
        below=1,
        decay=True,
    )


@dataclass(frozen=True)
class EMAForm(Options):
    """In what the teachers of public codes differ beside their decay."""

    ema_warmup: bool = option(
        True, "begin with the plain mean of the first students: min(decay, 1 - 1 / (t + 1)) (DASO)"
    )
    ema_buffers: Literal["ema", "copy"] = option(
        "ema", "running statistics of batch norms: averaged like weights (DASO), or the student's "
        "(ACR)",
    )  # fmt: skip


class ClassificationMethod(Method):
    """A method around a network that maps images to logits in eval mode.

    Args:
        student: the network.
        iterations: T of a member, for what depends on the progress of training.
        ema_decay: of a teacher, the student's exponential moving average, which is then the model
            that is evaluated and shipped; in (0, 1), or 0 for none.
        ema_form: of the teacher.

    Raises:
        ValueError: a number is out of range.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image",)}

    def __init__(
        self,
        student: nn.Module,
        *,
        iterations: int,
        ema_decay: float = 0.0,
        ema_form: EMAForm = EMAForm(),
    ) -> None:
        check_at_least_1(iterations=iterations)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay = {ema_decay} is not allowed (must be 0 or more, below 1)")
        teacher = None
        if ema_decay > 0:
            decay = warmup_decay(ema_decay) if ema_form.ema_warmup else ema_decay
            teacher = Teacher(student, decay, buffers=ema_form.ema_buffers)
        super().__init__(student, teacher)
        self.iterations = iterations

    def progress(self, t: int) -> float:
        """The part of the training that is done at own iteration t, in [0, 1)."""
        return t / self.iterations
