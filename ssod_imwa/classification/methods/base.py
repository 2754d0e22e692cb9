"""What the methods of classification have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn

from ssod_imwa.averaging.ema import warmup_decay
from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.freezing import TrainedPart, set_train_mode, train_only
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

    deployed: ImageClassifier | Experts

    def __init__(self, deployed: ImageClassifier | Experts) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.outputs(*inputs) if self.training else self.deployed(*inputs)

    @abstractmethod
    def outputs(self, *inputs: torch.Tensor) -> Any:
        """What the losses need."""


@overload
def deployed(
    network: ImageClassifier | Experts | TrainingNetwork,
) -> ImageClassifier | Experts: ...
@overload
def deployed(network: nn.Module) -> nn.Module: ...
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


@dataclass(frozen=True)
class Training:
    """What every method is told beside its own options: how long, which part, and what follows it.

    Attributes:
        iterations: T of a member, for what depends on the progress of training.
        part: what of the classifier is trained, see `models.freezing`.
        ema_decay: of a teacher, the student's exponential moving average, which is then the model
            that is evaluated and shipped; in (0, 1), or 0 for none.
        ema_form: of the teacher.

    Raises:
        ValueError: a number is out of range.
    """

    iterations: int
    part: TrainedPart = "all"
    ema_decay: float = 0.0
    ema_form: EMAForm = EMAForm()

    def __post_init__(self) -> None:
        check_at_least_1(iterations=self.iterations)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay = {self.ema_decay} is not allowed (must be 0 or more, below 1)"
            )

    def teacher(self, student: nn.Module) -> Teacher | None:
        """A teacher that follows the student, or none."""
        if self.ema_decay == 0:
            return None
        form = self.ema_form
        decay = warmup_decay(self.ema_decay) if form.ema_warmup else self.ema_decay
        return Teacher(student, decay, buffers=form.ema_buffers)


class ClassificationMethod(Method):
    """A method around a network that maps images to logits in eval mode.

    Args:
        student: a classifier, or a network around one, of which everything else is always trained.
        training: see there.

    Raises:
        ValueError: the classifier does not have the part that is to be trained.
    """

    reads: Mapping[str, tuple[str, ...]] = {"labeled": ("image",)}
    student: ImageClassifier | Experts | TrainingNetwork

    def __init__(
        self, student: ImageClassifier | Experts | TrainingNetwork, training: Training
    ) -> None:
        super().__init__(student, training.teacher(student))
        self.iterations = training.iterations
        self.part = training.part
        train_only(deployed(student), self.part)

    def set_train_mode(self) -> None:
        self.student.train()
        set_train_mode(deployed(self.student), self.part)

    def progress(self, t: int) -> float:
        """The part of the training that is done at own iteration t, in [0, 1)."""
        return t / self.iterations
