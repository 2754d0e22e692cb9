"""What labelers are given, and what they return.

A labeler is a function of explicit values of the unlabeled images' weak views and of a state that
`state_dict` shows in full. FixMatch calls, for each (micro-)batch of a step t::

    labeler.see_labeled(features, labels, processes)    # only if it reads labeled features
    pseudo_labels = labeler.label(weak, t)

and `after_step(t)` once the step is done. Nothing of a batch outlives its call except in the
state, so the same weak batch in the same state gets the same labels whatever came before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.config.options import Options, option


@dataclass(frozen=True)
class ThresholdOptions(Options):
    """Which pseudo-labels are sure enough to be learned."""

    threshold: float = option(
        0.95,
        "ρ, a pseudo-label is learned if its confidence is at least this",
        low=0,
        high=1,
        per_member=True,
    )


@dataclass(frozen=True, eq=False)
class WeakOutputs:
    """What the network says of the weak views of n unlabeled images; without gradients.

    Attributes:
        logits: float32 (n, C) of the head that pseudo-labels come from, z.
        features: float32 (n, d).
        indices: int64 (n,), positions in the unlabeled data set.
        tested_logits: float32 (n, C) of the other head, which is tested, if there are two.
        processes: those that have the other images of the batch.
    """

    logits: torch.Tensor
    features: torch.Tensor
    indices: torch.Tensor
    tested_logits: torch.Tensor | None = None
    processes: Group = field(default=Group())


class PseudoLabels(NamedTuple):
    """What is to be learned of n unlabeled images.

    Attributes:
        targets: int64 (n,), classes.
        mask: bool (n,), which of them are learned.
        probabilities: float32 (n, C), what targets are the largest of.
        records: scalars to record, by name.
    """

    targets: torch.Tensor
    mask: torch.Tensor
    probabilities: torch.Tensor
    records: dict[str, torch.Tensor]


class Labeler(ABC):
    """Pseudo-labels from weak predictions.

    Attributes:
        name: that configurations call it by.
        options_class: type of its options.
        averageable: entries of `state_dict` whose mean over members is a valid state; the others
            are each member's own.
        reads_labeled_features: whether `see_labeled` wants the teacher's features of labeled
            images.
        needs_tested_head: whether it reads `tested_logits`.
        moves_statistics: whether the teacher's batch norms are in training mode for these features,
            so that their running statistics follow the labeled images.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    averageable: ClassVar[frozenset[str]] = frozenset()
    reads_labeled_features: ClassVar[bool] = False
    needs_tested_head: ClassVar[bool] = False
    moves_statistics: bool = False

    def see_labeled(self, features: torch.Tensor, labels: torch.Tensor, processes: Group) -> None:
        """Take the teacher's features (B, d) and the labels (B,) of the step's labeled images."""
        raise NotImplementedError(f"{self.name} does not read labeled features")

    @abstractmethod
    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        """Pseudo-labels of the weak views at own iteration t."""

    def of_tested_head(
        self, probabilities: torch.Tensor, weak: WeakOutputs, t: int
    ) -> torch.Tensor:
        """Predictions (n, C) of the tested head as this labeler would correct them; as they are."""
        return probabilities

    def after_step(self, t: int) -> None:  # noqa: B027  # most labelers gather nothing
        """Close what a step has gathered."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that labels depend on beside their arguments."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if state:
            raise KeyError(f"{self.name} has no state, but was given {sorted(state)}")


class StateOfTensors:
    """State in tensors that are attributes, whose names `tensors` lists.

    Example:
        >>> class Counter(StateOfTensors):
        ...     tensors = ("counts",)
        ...     def __init__(self):
        ...         self.counts = torch.zeros(2)
        >>> counter = Counter()
        >>> counter.load_state_dict({"counts": torch.ones(2)})
        >>> counter.state_dict()
        {'counts': tensor([1., 1.])}
    """

    tensors: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        """The live tensors, by name: clone them, or serialize them at once."""
        return {name: getattr(self, name) for name in self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, on the devices of this object's tensors.

        Raises:
            ValueError: a tensor has another shape: another number of classes or images.
        """
        for name in self.tensors:
            mine, other = getattr(self, name), state[name]
            if mine.shape != other.shape:
                raise ValueError(
                    f"{name} of shape {tuple(other.shape)} does not fit {tuple(mine.shape)}"
                )
            mine.copy_(other)


def thresholded(probabilities: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest class of each row (n, C), int64 (n,), and whether it is sure enough, bool (n,).

    Example:
        >>> thresholded(torch.tensor([[0.96, 0.04], [0.3, 0.7]]), 0.95)
        (tensor([0, 1]), tensor([ True, False]))
    """
    confidence, targets = probabilities.max(1)
    return targets, confidence >= threshold


def class_counts_of(targets: torch.Tensor, classes: int, processes: Group) -> torch.Tensor:
    """How many of the targets (n,) of all processes are of each class, float32 (C,)."""
    return torch.bincount(processes.gather_rows(targets), minlength=classes).float()
