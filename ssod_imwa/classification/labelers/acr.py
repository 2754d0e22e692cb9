"""ACR's adaptive logit adjustment of pseudo-labels (Wei and Gan, CVPR 2023), as released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ssod_imwa.classification.class_counts import prior
from ssod_imwa.classification.labelers.base import (
    Labeler,
    PseudoLabels,
    StateOfTensors,
    ThresholdOptions,
    WeakOutputs,
    class_counts_of,
    thresholded,
)
from ssod_imwa.config.options import option

SMALLEST = 1e-12  # keeps logarithms of distributions finite


@dataclass(frozen=True)
class ACROptions(ThresholdOptions):
    """The adjustment, and the estimate of the unlabeled distribution that decides it."""

    tau_max: float = option(
        2.0, "τ_1, adjustment where the unlabeled classes are as the labeled ones are not", low=0
    )
    tau_min: float = option(0.0, "adjustment of the opposite case", low=0)
    tau_balanced: float = option(
        2.0, "τ_12, fixed adjustment of the labels that the balanced head learns", low=0
    )
    tau_supervised: float = option(
        2.0, "τ_2, adjustment of the balanced head's logits on labeled images", low=0
    )
    estimate: Literal["presence", "count"] = option(
        "presence",
        "what a batch says of the distribution: which classes it has (as released), or how many "
        "images of each",
    )
    momentum: float = option(0.99, "of the estimate from batch to batch", low=0, below=1)
    epoch: int = option(500, "iterations between two adjustments", low=1, iterations=True)
    start_epoch: int = option(6, "epochs of τ_1 before the distribution is estimated", low=0)


class ACR(StateOfTensors, Labeler):
    """Labels of z − τ log π with a τ that falls as the unlabeled classes are as the labeled ones.

    With the running estimate û of the unlabeled distribution, the anchors labeled (π), uniform and
    reversed, and d_a the mean over the last epoch of (KL(û‖π_a) + KL(π_a‖û)) / 2::

        τ = τ_min + (τ_max − τ_min) exp(d_labeled) / Σ_a exp(d_a)

    from epoch `start_epoch` on, τ_max before; an image is learned if max σ(z − τ log π) or max σ(z)
    is at least ρ. û sees what the tested (balanced) head predicts surely on images that are not
    labeled ones. A batch without such an image changes nothing and counts as a divergence of 0.

    Args:
        counts: labeled images of each class, N; π = N / Σ N.
        unlabeled: images of the unlabeled set.
        options: see there.
        also_labeled: bool (N_u,), which of them are labeled images, too; None for none.
        device: of the state.

    Attributes:
        estimate: û (C,).
        divergences: (3,) sums over the open epoch, in the order of the anchors.
        tau: τ, a scalar.

    Source: ACR, equations 5 to 9, and its released code as the specification describes it.
    """

    name = "acr"
    options_class = ACROptions
    tensors = ("estimate", "divergences", "tau")
    averageable = frozenset(tensors)
    needs_tested_head = True

    def __init__(
        self,
        counts: Sequence[int],
        unlabeled: int,
        options: ACROptions,
        *,
        also_labeled: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        labeled = prior(counts).to(device)
        uniform = torch.full_like(labeled, 1 / len(labeled))
        self.log_prior = (labeled + SMALLEST).log()
        self.anchors = torch.stack([labeled, uniform, reversed_by_rank(labeled)])
        self._countable = (
            torch.ones(unlabeled, dtype=torch.bool) if also_labeled is None else ~also_labeled
        ).to(device)
        self.estimate = uniform
        self.divergences = torch.zeros(3, device=device)
        self.tau = torch.tensor(float(options.tau_max), device=device)

    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        if t >= self.options.start_epoch * self.options.epoch:
            self._observe(weak)
        adjusted = (weak.logits - self.tau * self.log_prior).softmax(1)
        threshold = self.options.threshold
        targets, mask = thresholded(adjusted, threshold)
        mask = mask | (weak.logits.softmax(1).amax(1) >= threshold)
        return PseudoLabels(targets, mask, adjusted, {"labels/tau": self.tau.clone()})

    def balanced(self, weak: WeakOutputs) -> PseudoLabels:
        """What the balanced head learns: z − τ_12 log π of the other head, and either's gate."""
        adjusted = (weak.logits - self.options.tau_balanced * self.log_prior).softmax(1)
        threshold = self.options.threshold
        targets, mask = thresholded(adjusted, threshold)
        mask = mask | (_tested(weak).softmax(1).amax(1) >= threshold)
        return PseudoLabels(targets, mask, adjusted, {})

    def _observe(self, weak: WeakOutputs) -> None:
        """Move û by a batch, and add up its divergences from the anchors."""
        predicted, sure = thresholded(_tested(weak).softmax(1), self.options.threshold)
        counted = sure & self._countable[weak.indices]
        classes = len(self.estimate)
        # One class more, for what is not counted: all processes have rows of equal shape.
        seen = class_counts_of(predicted.where(counted, classes), classes + 1, weak.processes)
        seen = seen[:classes]
        if self.options.estimate == "presence":
            seen = seen.clamp(max=1)
        total = seen.sum()
        batch = seen / total.clamp(min=1)
        moved = torch.lerp(batch, self.estimate, self.options.momentum)
        self.estimate.copy_(torch.where(total > 0, moved, self.estimate))
        apart = symmetric_divergences(self.estimate, self.anchors)
        self.divergences += torch.where(total > 0, apart, 0.0)

    def after_step(self, t: int) -> None:
        options = self.options
        epoch, rest = divmod(t + 1, options.epoch)
        if rest or epoch < options.start_epoch:
            return
        apart = (self.divergences / options.epoch).softmax(0)
        self.tau.copy_(options.tau_min + (options.tau_max - options.tau_min) * apart[0])
        self.divergences.zero_()


def _tested(weak: WeakOutputs) -> torch.Tensor:
    assert weak.tested_logits is not None  # the method has seen `needs_tested_head`
    return weak.tested_logits


def reversed_by_rank(prior: torch.Tensor) -> torch.Tensor:
    """The prior (C,) with the most frequent class as rare as the rarest, and so on.

    Example:
        >>> reversed_by_rank(torch.tensor([0.3, 0.6, 0.1]))
        tensor([0.3000, 0.1000, 0.6000])
    """
    order = prior.argsort(descending=True, stable=True)
    result = torch.empty_like(prior)
    result[order] = prior[order.flip(0)]
    return result


def symmetric_divergences(estimate: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(KL(û‖π_a) + KL(π_a‖û)) / 2 of an estimate (C,) and anchors (A, C), in nats, (A,).

    Example:
        >>> symmetric_divergences(torch.tensor([0.75, 0.25]), torch.tensor([[0.5, 0.5]]))
        tensor([0.1373])
    """
    log_ratio = (estimate + SMALLEST).log() - (anchors + SMALLEST).log()
    return 0.5 * ((estimate - anchors) * log_ratio).sum(1)
