"""DARP: pseudo-labels whose class totals are those of the unlabeled set (arXiv 2007.08844)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssod_imwa.classification.class_counts import prior
from ssod_imwa.classification.labelers.base import (
    Labeler,
    PseudoLabels,
    StateOfTensors,
    ThresholdOptions,
    WeakOutputs,
    thresholded,
)
from ssod_imwa.classification.labelers.darp_solver import (
    Accuracy,
    nearest_labels,
    row_weights,
    without_noise,
)
from ssod_imwa.config.options import option


@dataclass(frozen=True)
class DARPOptions(ThresholdOptions):
    """When labels are refined, to which totals, and how well."""

    warmup_part: float = option(
        0.4, "part of the training that uses predictions as they are", low=0, high=1
    )
    totals: list[float] = option(
        [],
        "unlabeled images of each class, an estimate, scaled to their number; [] takes the labeled "
        "shares (the method's assumption)",
        low=0,
    )
    alpha: float = option(
        2.0, "a class keeps this many times its total of its surest entries", above=0
    )
    refine_period: int = option(
        10, "iterations between two refinements; 100 for CIFAR-100 and STL-10 in DARP's code", low=1
    )
    rounds: int = option(10, "passes over the classes; 20 where the period is 100", low=1)
    tolerance: float = option(
        0.1, "images that a class's total may be off; 0.3 where the period is 100", above=0
    )


class DARP(StateOfTensors, Labeler):
    """FixMatch's rule on rows of the refined labels X of all unlabeled images.

    Every step writes its predictions into the table P. After the warm-up, each `refine_period`
    iterations, X becomes the solution of the program in `darp_solver` for P; the first time at the
    end of the warm-up, as in DARP's code.

    Args:
        counts: labeled images of each class.
        unlabeled: N_u, images of the unlabeled set.
        options: see there.
        iterations: T of a member.
        device: of the state.

    Attributes:
        predicted: P (N_u, C) float32, the last prediction of each image, 1 / C where there is none.
        refined: X (N_u, C) float32.

    Raises:
        ValueError: a number is out of range, or totals are not one a class.
    """

    name = "darp"
    options_class = DARPOptions
    tensors = ("predicted", "refined")
    # All members' labels meet the same constraints, so that their mean does.
    averageable = frozenset(tensors)

    def __init__(
        self,
        counts: Sequence[int],
        unlabeled: int,
        options: DARPOptions,
        *,
        iterations: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.totals = class_totals(counts, unlabeled, options.totals).to(device)
        self.start = round(options.warmup_part * iterations)
        self.accuracy = Accuracy(rounds=options.rounds, tolerance=options.tolerance)
        classes = len(counts)
        self.predicted = torch.full((unlabeled, classes), 1 / classes, device=device)
        self.refined = self.predicted.clone()

    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        probabilities = weak.logits.softmax(1)
        rows = weak.processes.gather_rows(weak.indices)
        self.predicted[rows] = weak.processes.gather_rows(probabilities)
        if t >= self.start:
            if (t - self.start) % self.options.refine_period == 0:
                self._refine()
            probabilities = self.refined[weak.indices]
        return PseudoLabels(*thresholded(probabilities, self.options.threshold), probabilities, {})

    def _refine(self) -> None:
        cleaned = without_noise(self.predicted, self.totals, alpha=self.options.alpha)
        labels = nearest_labels(cleaned, row_weights(cleaned), self.totals, self.accuracy)
        self.refined.copy_(labels)


def class_totals(counts: Sequence[int], unlabeled: int, estimate: Sequence[float]) -> torch.Tensor:
    """M (C,), float32 with the sum N_u: an estimate, or the labeled shares, scaled.

    Raises:
        ValueError: the estimate is not one a class, or sums to 0.

    Example:
        >>> class_totals([3, 1], 8, []), class_totals([3, 1], 8, [1, 1])
        (tensor([6., 2.]), tensor([4., 4.]))
    """
    if not estimate:
        return prior(counts) * unlabeled
    if len(estimate) != len(counts) or min(estimate) <= 0:
        raise ValueError(
            f"totals = {list(estimate)} is not allowed (must be above 0, one for each of the "
            f"{len(counts)} classes)"
        )
    shares = torch.tensor(estimate, dtype=torch.float64)
    return (shares / shares.sum() * unlabeled).float()
