"""ABC's auxiliary balanced classifier (Lee et al., NeurIPS 2021, arXiv 2110.10368)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import checked_counts
from ssod_imwa.classification.extras.base import Extra, Step, masked_cross_entropy
from ssod_imwa.classification.labelers.base import Labeler, thresholded
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.config.options import Options, option


@dataclass(frozen=True)
class ABCOptions(Options):
    """Which pseudo-labels the balanced classifier learns."""

    threshold: float = option(0.95, "least confidence of its own pseudo-labels", low=0, high=1)
    epoch: int = option(500, "iterations between two changes of its masks", low=1, iterations=True)


class BalancedClassifier(Extra):
    """A head on the shared features whose images are drawn so that classes count alike; tested.

    With its logits h, N the labeled counts, N_K the least of them, q = σ(h(weak)), k = argmax q and
    e / E the part of the training, in whole epochs::

        L_cls = mean m CE(h, y)                      m ~ Bernoulli(N_K / N_y)
        L_con = Σ_views mean g CE(h(strong), q)      g = [max q ≥ ρ] m
                                                     m ~ Bernoulli(1 − (e / E)(1 − N_K / N_k))

    Means are over all images. q is as the labeler corrects it (DASO blends it, too).

    Args:
        counts: labeled images of each class.
        options: see there.
        labeler: FixMatch's.
        iterations: T of a member.
        device: of the network.
    """

    needs_tested_head = True

    def __init__(
        self,
        counts: Sequence[int],
        options: ABCOptions,
        labeler: Labeler,
        *,
        iterations: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        self.labeler = labeler
        self.iterations = iterations
        checked = checked_counts(counts)
        self.rates = (checked.min() / checked).float().to(device)

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        labeled, strong, weak = (
            outputs.tested_logits for outputs in (step.labeled, step.strong, step.weak)
        )
        assert labeled is not None  # FixMatch has seen that there are two heads
        assert strong is not None
        assert weak is not None
        drawn = torch.bernoulli(self.rates[step.labels])
        supervised = F.cross_entropy(widened(labeled), step.labels, reduction="none")
        targets = self.labeler.of_tested_head(weak.softmax(1), step.weak, step.t)
        classes, sure = thresholded(targets, self.options.threshold)
        mask = sure * torch.bernoulli(self.unlabeled_rates(step.t)[classes])
        views = len(strong) // len(weak)
        return {
            "loss_abc": (supervised * drawn).mean(),
            "loss_abc_unlabeled": views * masked_cross_entropy(strong, targets, mask),
            "labels/abc_mask_rate": 100 * mask.mean(),
        }

    def unlabeled_rates(self, t: int) -> torch.Tensor:
        """Probability (C,) that an image with this pseudo-label is learned at own iteration t."""
        epoch = self.options.epoch
        done = t // epoch * epoch / self.iterations
        return 1 - done * (1 - self.rates)
