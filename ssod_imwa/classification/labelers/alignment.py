"""Progressive distribution alignment, the "+" of CReST+ (Wei et al., arXiv 2102.09559)."""

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
    thresholded,
)
from ssod_imwa.config.options import option

SMOOTHING = 1e-6


@dataclass(frozen=True)
class AlignmentOptions(ThresholdOptions):
    """The target distribution, and what predictions are compared with it."""

    temperature_min: float = option(
        0.5, "t_min, exponent of the labeled prior in the last generation; 1 in the first", low=0,
        high=1,
    )  # fmt: skip
    batches: int = option(128, "batches whose mean prediction is aligned", low=1)
    batches_at_start: Literal["none", "uniform"] = option(
        "none",
        "of these at the start: none, and the batch itself is among them (DASO's code), or all, of "
        "uniform predictions, and it is not (CREST's)",
    )


class Alignment(StateOfTensors, Labeler):
    """FixMatch's rule on q' ∝ q p_t / p̃.

    p_t ∝ π^t with the labeled prior π and the generation's exponent t, p̃ the mean prediction of the
    last `batches`; both with 1e-6 added.

    Args:
        counts: labeled images of each class before any generation added to them.
        options: see there.
        generation: of CReST, from 1.
        generations: G.
        device: of the state.

    Attributes:
        means: (batches, C) mean predictions of batches, a ring; those not yet there are 0.
        written: scalar int64, batches written.

    Source: CReST, section 3.3 and equation 4.
    """

    name = "alignment"
    options_class = AlignmentOptions
    tensors = ("means", "written")
    averageable = frozenset({"means"})

    def __init__(
        self,
        counts: Sequence[int],
        options: AlignmentOptions,
        *,
        generation: int = 1,
        generations: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        exponent = alignment_exponent(generation, generations, minimum=options.temperature_min)
        powers = prior(counts).to(device) ** exponent
        self.target = powers / powers.sum()
        uniform = options.batches_at_start == "uniform"
        classes = len(counts)
        fill = 1 / classes if uniform else 0.0
        self.means = torch.full((options.batches, classes), fill, device=device)
        self.written = torch.tensor(options.batches if uniform else 0, device=device)

    def label(self, weak: WeakOutputs, t: int) -> PseudoLabels:
        probabilities = weak.logits.softmax(1)
        of_batch = weak.processes.gather_rows(probabilities.mean(0, keepdim=True)).mean(0)
        includes_batch = self.options.batches_at_start == "none"
        if includes_batch:
            self._write(of_batch)
        aligned = probabilities * (self.target + SMOOTHING) / (self._mean() + SMOOTHING)
        aligned = aligned / aligned.sum(1, keepdim=True)
        if not includes_batch:
            self._write(of_batch)
        return PseudoLabels(*thresholded(aligned, self.options.threshold), aligned, {})

    def _write(self, mean: torch.Tensor) -> None:
        self.means.index_copy_(0, (self.written % len(self.means))[None], mean[None])
        self.written += 1

    def _mean(self) -> torch.Tensor:
        return self.means.sum(0) / self.written.clamp(1, len(self.means))


def alignment_exponent(generation: int, generations: int, *, minimum: float) -> float:
    """T of generation g in 1..G: from 1 in a straight line to the minimum; 1 for one generation.

    Raises:
        ValueError: the generation is not in 1..G.

    Example:
        >>> [alignment_exponent(g, 5, minimum=0.5) for g in range(1, 6)]
        [1.0, 0.875, 0.75, 0.625, 0.5]
    """
    if not 1 <= generation <= generations:
        raise ValueError(f"generation = {generation} is not allowed (must be 1..{generations})")
    if generations == 1:
        return 1.0
    return 1.0 - (generation - 1) / (generations - 1) * (1.0 - minimum)
