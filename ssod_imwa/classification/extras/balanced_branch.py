"""ACR's balanced branch (Wei and Gan, CVPR 2023)."""

from __future__ import annotations

import torch

from ssod_imwa.classification.extras.base import Extra, Step, masked_cross_entropy
from ssod_imwa.classification.labelers.acr import ACR
from ssod_imwa.classification.losses.balanced_softmax import logit_adjusted_loss


class BalancedBranch(Extra):
    """A second head that learns adjusted labels, and is tested.

    With its logits z̃, the labels of `ACR.balanced` and π::

        L_b  = CE(z̃ + τ_2 log π, y)
        L_ub = mean m_b CE(z̃(strong), ŷ_b)

    Args:
        labeler: whose prior, options and balanced labels it uses.
    """

    needs_tested_head = True

    def __init__(self, labeler: ACR) -> None:
        self.labeler = labeler

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        labeled, strong = step.labeled.tested_logits, step.strong.tested_logits
        assert labeled is not None  # FixMatch has seen that there are two heads
        assert strong is not None
        labeler = self.labeler
        learned = labeler.balanced(step.weak)
        return {
            "loss_balanced": logit_adjusted_loss(
                labeled, step.labels, labeler.log_prior, tau=labeler.options.tau_supervised
            ),
            "loss_balanced_unlabeled": masked_cross_entropy(strong, *learned[:2]),
            "labels/balanced_mask_rate": 100 * learned.mask.float().mean(),
        }
