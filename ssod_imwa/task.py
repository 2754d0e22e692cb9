"""What a run trains: the parts that detection and classification make differently."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.members import Rule
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.config.shared import batch_sizes
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import ConfigError


class Batches(Protocol):
    """What the trainer reads: a global step -> the batches from there on."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Images of a batch in each stream, over all processes."""

    def __call__(self, start: int) -> Iterator[Any]: ...


Evaluator = Callable[[nn.Module], dict[str, float]]
Recompute = Callable[[Mapping[str, nn.Module]], object]


_Task = TypeVar("_Task", bound="Task")


class Task(ABC):
    """The data of a configuration, read, and what is built from both.

    Attributes:
        cfg: completed by what the data decide, such as the number of classes.
        name: "detection" or "classification".
        dataset: what is trained and tested on, in words.
        method: of training, as results name it.
        fold: of the labeled images, None if there is no choice.
        ranks: who trains which member on which part of a batch.
        own: the configuration of each member where members differ, else nothing.
    """

    name: str
    dataset: str
    method: str
    fold: int | None = None

    def __init__(self, cfg: CfgNode, ranks: Ranks = Ranks.alone()) -> None:
        self.cfg = cfg
        self.ranks = ranks
        self.own: Sequence[CfgNode] = ()

    def configured(self: _Task, cfg: CfgNode) -> _Task:
        """The same data under another configuration, such as a member's own."""
        other = copy.copy(self)
        other.cfg = cfg
        return other

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in label order."""

    @property
    @abstractmethod
    def class_counts(self) -> Sequence[int]:
        """Labeled objects, or images, of each class to learn from."""

    @property
    @abstractmethod
    def images(self) -> dict[str, int]:
        """How many images are labeled, unlabeled (if any are read) and tested."""

    @property
    def stored_size(self) -> int | None:
        """Edge in pixels at which the first test set's images are in memory; None for files."""
        return None

    @abstractmethod
    def build_method(self, device: torch.device) -> Method:
        """The method around its model, on the device, with the initial weights."""

    @abstractmethod
    def load_model(self, weights: str) -> nn.Module:
        """A model to evaluate, on the CPU, with the weights of a file."""

    @abstractmethod
    def method_settings(self, method: Method) -> dict[str, Any]:
        """What `Method.use` takes for a member with this configuration.

        Raises:
            ConfigError: the configuration does not go with the method.
        """

    @abstractmethod
    def build_batches(
        self, schedule: EpisodeSchedule, device: torch.device, reads: Mapping[str, tuple[str, ...]]
    ) -> Batches:
        """What the trainer reads: a global step -> the batches from there on.

        Args:
            schedule: which member trains when.
            device: of the models.
            reads: streams and views that batches hold, see `Method`.
        """

    @abstractmethod
    def build_evaluator(
        self, processes: Group | None = None, *, poll: Callable[[int, int], object] | None = None
    ) -> Evaluator:
        """A function from a model in eval mode to its metrics in percent.

        Args:
            processes: those that have the model and share the test images; None takes all.
            poll: called after each batch of a test set, equally often on all ranks, with how many
                are done and how many there are; what it raises ends the evaluation.
        """

    @abstractmethod
    def build_bn_recomputation(self, batches: Batches, *, count: int) -> Recompute:
        """A function that re-estimates the batch norms of averaged models on some batches."""

    @abstractmethod
    def build_training_loss(self, images: int) -> Callable[[nn.Module], float]:
        """A function from a model to its plain supervised loss on images that it learns from.

        These are labeled, not augmented, and kept in memory, the same in every process. A call is
        in eval mode, without gradient, and leaves no trace.

        Args:
            images: how many; all if there are no more.
        """

    @abstractmethod
    def fingerprints(self) -> dict[str, Any]:
        """What identifies the training data, by what it is."""

    @property
    def initialization(self) -> tuple[int | str, ...]:
        """What initial weights depend on beside the seed."""
        return ()

    def lr_factor(self, name: str) -> float:
        """Factor of the learning rate of the student's parameter with this name."""
        return 1.0

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]] | None:
        """The optimizer's groups, if not all parameters but norms are treated alike."""
        return None

    def coefficients(self, method: Method) -> Sequence[float] | Rule | None:
        """How IMWA weighs members."""
        return self.cfg.IMWA.COEFFICIENTS or None

    def hooks(self) -> list[HookBase]:
        """Hooks of the task's own, called while a member's last weights are still live."""
        return []

    def leftovers(self) -> Sequence[Path]:
        """What such hooks wrote to OUTPUT_DIR in an earlier run, where this one has none of them.

        Hooks of this run replace their files themselves.
        """
        return ()


class NamedSet(Protocol):
    """A data set, of whichever task."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...


def image_counts(
    labeled: NamedSet, unlabeled: NamedSet | None, tests: Sequence[NamedSet]
) -> dict[str, int]:
    """What `Task.images` says of these data sets."""
    rest = {} if unlabeled is None else {"unlabeled": len(unlabeled)}
    return {"labeled": len(labeled), **rest, "tested": sum(map(len, tests))}


_Set = TypeVar("_Set", bound=NamedSet)


def evaluate_sets(
    tests: Sequence[_Set], evaluate: Callable[[_Set], Mapping[str, float]]
) -> dict[str, float]:
    """The metrics of test sets together, with "SET/" before their names if there are several."""
    metrics: dict[str, float] = {}
    for test in tests:
        prefix = f"{test.name}/" if len(tests) > 1 else ""
        metrics |= {prefix + name: value for name, value in evaluate(test).items()}
    return metrics


def check_batch_sizes(cfg: CfgNode, processes: int) -> None:
    """Raise ConfigError if a batch cannot be cut for processes and accumulation."""
    steps = cfg.SOLVER.ACCUMULATION_STEPS
    for key, images in batch_sizes(cfg).items():
        if images % (processes * steps):
            raise ConfigError(
                f"{key} = {images} is not allowed on {processes} processes with {steps} "
                "accumulation steps (must be a multiple)"
            )
