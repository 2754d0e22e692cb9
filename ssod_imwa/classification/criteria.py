"""From logits and targets to the loss of a method, with what it knows of the class frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification import losses
from ssod_imwa.classification.class_counts import (
    deferred_weights,
    effective_number_weights,
    ldam_margins,
    log_odds,
    log_prior,
    smoothing_by_class,
)

Loss = Literal[
    "cross_entropy",
    "focal",
    "ldam",
    "balanced_softmax",
    "label_aware_smoothing",
    "balanced_bce",
    "gml",
]
Weights = Literal["none", "effective_number"]

# Those whose targets may be shares of classes, as mixed images have them.
SHARED_TARGETS = ("cross_entropy", "balanced_softmax", "balanced_bce")
WEIGHTED = ("cross_entropy", "ldam")
SMOOTHED = (*SHARED_TARGETS, "label_aware_smoothing")


class Criterion(nn.Module):
    """A loss of `classification.losses`, or torch's cross-entropy, with its class statistics.

    Args:
        name: of the loss.
        counts: training images of each class.
        weights: of classes, for cross_entropy and ldam.
        weights_from: the progress of training from which the weights count: 0 from the start, 0.8
            is DRW's (`deferred_weights`).
        beta: of the effective numbers.
        gamma: of the focal loss.
        tau: of balanced softmax.
        largest_margin: of LDAM.
        scale: of LDAM, whose logits are cosines.
        smoothing: head and tail of label-aware smoothing; for cross_entropy, balanced_softmax and
            balanced_bce the first is the plain label smoothing.

    Raises:
        ValueError: an argument is out of range, unknown, or would do nothing.

    Example:
        >>> criterion = Criterion("balanced_softmax", [30, 10])
        >>> criterion(torch.zeros(1, 2), torch.tensor([0]), progress=0.0)
        tensor(0.2877)
    """

    def __init__(
        self,
        name: Loss,
        counts: Sequence[int],
        *,
        weights: Weights = "none",
        weights_from: float = 0.0,
        beta: float = 0.9999,
        gamma: float = 1.0,
        tau: float = 1.0,
        largest_margin: float = 0.5,
        scale: float = 30.0,
        smoothing: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        _check(name, weights, weights_from, smoothing)
        self.name = name
        self.weights_from = weights_from
        self.gamma = gamma
        self.tau = tau
        self.scale = scale
        self.label_smoothing = smoothing[0]
        self._keep(
            "weights", effective_number_weights(counts, beta=beta) if weights != "none" else None
        )
        self._keep(
            "margins", ldam_margins(counts, largest=largest_margin) if name == "ldam" else None
        )
        self._keep("log_prior", log_prior(counts))
        self._keep("log_odds", log_odds(counts) if name == "balanced_bce" else None)
        head, tail = smoothing
        aware = name == "label_aware_smoothing"
        self._keep("smoothing", smoothing_by_class(counts, head=head, tail=tail) if aware else None)

    def _keep(self, name: str, values: torch.Tensor | None) -> None:
        self.register_buffer(name, values, persistent=False)

    @property
    def takes_shares(self) -> bool:
        """Whether targets may be (B, C) shares of classes."""
        return self.name in SHARED_TARGETS and self.weights is None

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, *, progress: float
    ) -> torch.Tensor:
        """The loss of logits (B, C) and labels (B,), or shares (B, C) where they are taken."""
        if self.name == "focal":
            return losses.focal_loss(logits, targets, gamma=self.gamma)
        if self.name == "ldam":
            return losses.ldam_loss(
                logits, targets, self.margins, scale=self.scale, weight=self._weights(progress)
            )
        if self.name == "label_aware_smoothing":
            return losses.label_aware_smoothing_loss(logits, targets, self.smoothing)
        if self.name == "gml":
            return losses.gml_loss(logits, targets, self.log_prior)
        if self.name == "balanced_bce":
            return losses.balanced_bce_loss(logits, self._smoothed(targets, logits), self.log_odds)
        if self.name == "balanced_softmax":
            logits = losses.adjusted_logits(logits, self.log_prior, self.tau)
        logits, weights = losses.widened(logits), self._weights(progress)
        return F.cross_entropy(
            logits,
            targets,
            weight=None if weights is None else weights.to(logits.dtype),
            label_smoothing=self.label_smoothing,
        )

    def _weights(self, progress: float) -> torch.Tensor | None:
        if self.weights is None:
            return None
        return deferred_weights(self.weights, progress=progress, start=self.weights_from)

    def _smoothed(self, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1])
        return targets.to(logits.dtype).lerp(
            torch.full_like(logits, 1 / logits.shape[1]), self.label_smoothing
        )


def _check(name: str, weights: str, weights_from: float, smoothing: tuple[float, float]) -> None:
    for what, value, allowed in (("loss", name, Loss), ("weights", weights, Weights)):
        if value not in get_args(allowed):
            raise ValueError(
                f"{what} = {value!r} is not allowed (must be one of {list(get_args(allowed))})"
            )
    if weights != "none" and name not in WEIGHTED:
        raise ValueError(
            f"weights = {weights!r} with loss = {name!r} is not allowed "
            f"(must be none; {' and '.join(WEIGHTED)} take class weights)"
        )
    if not 0 <= weights_from <= 1:
        raise ValueError(f"weights_from = {weights_from} is not allowed (must be between 0 and 1)")
    if not all(0 <= share < 1 for share in smoothing):
        raise ValueError(f"smoothing = {smoothing} is not allowed (must be 0 or more, below 1)")
    if any(smoothing) and name not in SMOOTHED:
        raise ValueError(
            f"smoothing = {smoothing} with loss = {name!r} is not allowed "
            f"(must be 0; {', '.join(SMOOTHED)} take it)"
        )
