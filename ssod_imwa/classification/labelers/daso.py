"""DASO's blend of linear and semantic pseudo-labels (Oh et al., arXiv 2106.05682)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.labelers.base import (
    Labeler,
    PseudoLabels,
    StateOfTensors,
    ThresholdOptions,
    WeakOutputs,
    class_counts_of,
    thresholded,
)
from ssod_imwa.classification.labelers.prototypes import Prototypes
from ssod_imwa.config.options import option


@dataclass(frozen=True)
class DASOOptions(ThresholdOptions):
    """The blend, its memory, and the loss that aligns strong views with prototypes."""

    warmup: int = option(
        5000, "iterations of plain FixMatch, in which memories fill", low=0, iterations=True
    )
    queue: int = option(
        256, "L, features of each class that its prototype is the mean of; at least a batch", low=1
    )
    prototype_temperature: float = option(0.05, "T_proto of the cosines", above=0)
    distribution_temperature: float = option(
        1.5,
        "T_dist; 1.5 for CIFAR-10 with alike distributions, 0.3 for others, CIFAR-100 and STL-10",
        above=0,
    )
    window: int = option(
        100, "iterations whose pseudo-labels are counted for the distribution", low=1
    )
    fixed_blend: float = option(
        0.0, "share of the semantic label instead of v by distribution (ablation); 0: v", low=0,
        high=1,
    )  # fmt: skip
    semantic_weight: float = option(
        1.0, "weight of the semantic alignment loss; 0 blends alone", low=0
    )
    moving_statistics: bool = option(
        True,
        "the teacher's batch norms are in training mode on labeled images, as released, so that "
        "they follow those; False leaves the teacher in eval mode",
    )


class DASO(StateOfTensors, Labeler):
    """FixMatch's rule on p' = (1 − v_k') p + v_k' q.

    p are the linear predictions, k' their class, q = σ(cos(f, c) / T_proto) those of the prototypes
    c, and v_k = (m_k / max m)^(1 / T_dist) with the distribution m of the pseudo-labels in the last
    closed window. So predictions of frequent classes lean on prototypes. Before the end of the
    warm-up, and before the first window is closed, labels are FixMatch's.

    Args:
        counts: labeled images of each class.
        options: see there.
        width: d, of the features.
        device: of the state.

    Attributes:
        prototypes: of the classes, from the teacher's features of labeled images.
        histogram: (C,) counts of the last closed window.
        collected: (C,) counts of the open window, of all pseudo-labels whether learned or not.

    Raises:
        ValueError: a number is out of range.
    """

    name = "daso"
    options_class = DASOOptions
    tensors = ("histogram", "collected")
    # Members count equally many labels, so the mean of counts is that of distributions.
    averageable = frozenset(tensors)
    reads_labeled_features = True

    def __init__(
        self,
        counts: Sequence[int],
        options: DASOOptions,
        *,
        width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.moves_statistics = options.moving_statistics
        classes = len(counts)
        self.prototypes = Prototypes(
            classes,
            width,
            size=options.queue,
            temperature=options.prototype_temperature,
            device=device,
        )
        self.histogram = torch.zeros(classes, device=device)
        self.collected = torch.zeros(classes, device=device)

    def see_labeled(self, features: torch.Tensor, labels: torch.Tensor, processes: Group) -> None:
        self.prototypes.write_(features, labels, processes)

    def is_active(self, t: int) -> bool:
        """Whether the warm-up is over at own iteration t."""
        return t >= self.options.warmup

    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        linear = weak.logits.softmax(1)
        blended = self.of_tested_head(linear, weak, t)
        if self.is_active(t) and self.options.fixed_blend > 0:
            blended = self._mixed(linear, self.options.fixed_blend, weak)
        targets, mask = thresholded(blended, self.options.threshold)
        self.collected += class_counts_of(targets, len(self.collected), weak.processes)
        records = {"labels/blended": (targets != linear.argmax(1)).float().mean() * 100}
        return PseudoLabels(targets, mask, blended, records)

    def of_tested_head(
        self, probabilities: torch.Tensor, weak: WeakOutputs, t: int
    ) -> torch.Tensor:
        """Predictions of any head, blended by the distribution; the fixed blend is not for them."""
        if not self.is_active(t):
            return probabilities
        shares = self.semantic_shares()[probabilities.argmax(1)][:, None]
        return self._mixed(probabilities, shares, weak)

    def _mixed(
        self, probabilities: torch.Tensor, share: torch.Tensor | float, weak: WeakOutputs
    ) -> torch.Tensor:
        semantic = self.prototypes.similarity_logits(weak.features).softmax(1)
        return (1 - share) * probabilities + share * semantic

    def semantic_shares(self) -> torch.Tensor:
        """V (C,), what semantic labels count by the class of the linear one.

        Example:
            >>> labeler = DASO([3, 1], DASOOptions(distribution_temperature=0.5), width=1)
            >>> _ = labeler.histogram.copy_(torch.tensor([8.0, 4.0]))
            >>> labeler.semantic_shares()
            tensor([1.0000, 0.2500])
        """
        # clamp: before the first window closes all are 0, and so are the shares.
        relative = self.histogram / self.histogram.max().clamp(min=torch.finfo(torch.float32).tiny)
        return relative ** (1 / self.options.distribution_temperature)

    def after_step(self, t: int) -> None:
        if (t + 1) % self.options.window == 0:
            self.histogram.copy_(self.collected)
            self.collected.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"prototypes": self.prototypes.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prototypes.load_state_dict(state["prototypes"])
        super().load_state_dict(state)
