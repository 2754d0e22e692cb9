"""What losses beside FixMatch's are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ssod_imwa.classification.labelers.base import PseudoLabels, WeakOutputs
from ssod_imwa.classification.losses.base import widened
from ssod_imwa.classification.methods.fixmatch_network import HeadOutputs


@dataclass(frozen=True, eq=False)
class Step:
    """A step as FixMatch has computed it.

    Attributes:
        labeled: outputs of B labeled images, with gradients.
        labels: int64 (B,).
        weak: of n unlabeled images, without gradients.
        strong: outputs of their strong views, (v n) rows: all of the first view, then all of the
            second.
        pseudo_labels: that FixMatch learns.
        t: the member's own iteration.
    """

    labeled: HeadOutputs
    labels: torch.Tensor
    weak: WeakOutputs
    strong: HeadOutputs
    pseudo_labels: PseudoLabels
    t: int


class Extra(ABC):
    """A loss beside FixMatch's.

    Attributes:
        needs_tested_head: whether it trains a second head, which is then the one that is tested.
    """

    needs_tested_head: ClassVar[bool] = False

    @abstractmethod
    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        """Scalars by name, as `Method.losses` returns them."""


def masked_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The mean over all rows, learned or not, of mask · CE.

    Args:
        logits: (v n, C), v views of n images.
        targets: int64 (n,) classes, or (n, C) shares of classes.
        mask: (n,), bool or a weight.

    Source: FixMatch (arXiv 2001.07685), equation 4, divided by all images.

    Example:
        >>> masked_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1, 0]))
        tensor(0.3466)
    """
    views = len(logits) // len(targets)
    losses = F.cross_entropy(
        widened(logits), targets.repeat(views, *[1] * (targets.dim() - 1)), reduction="none"
    )
    return (losses * mask.repeat(views)).mean()
