"""What is recorded of pseudo-labels, and counted of them where the truth is known."""

from __future__ import annotations

import torch

from ssod_imwa.classification.labelers.base import PseudoLabels
from ssod_imwa.engine.label_statistics import LabelStatistics


@torch.no_grad()
def label_records(pseudo_labels: PseudoLabels) -> dict[str, torch.Tensor]:
    """The labeler's own scalars, and two percentages of the images of a batch, float32.

    Returns:
        `labels/mask_rate`: images that are learned; `labels/confidence`: mean confidence of all.

    Example:
        >>> probabilities = torch.tensor([[0.99, 0.01], [0.4, 0.6]])
        >>> labels = PseudoLabels(torch.tensor([0, 1]), torch.tensor([True, False]),
        ...                       probabilities, {})
        >>> label_records(labels)
        {'labels/mask_rate': tensor(50.), 'labels/confidence': tensor(79.5000)}
    """
    return {
        **pseudo_labels.records,
        "labels/mask_rate": 100 * pseudo_labels.mask.float().mean(),
        "labels/confidence": 100 * pseudo_labels.probabilities.amax(1).mean(),
    }


def count_labels(
    statistics: LabelStatistics, pseudo_labels: PseudoLabels, truth: torch.Tensor | None
) -> None:
    """Add pseudo-labels to what is counted of a run's labels.

    Args:
        statistics: of the method.
        pseudo_labels: of the images.
        truth: int64 (n,), hidden classes, -1 where they are not known, or None. No loss sees them.
    """
    targets, mask = pseudo_labels.targets, pseudo_labels.mask
    statistics.add(
        targets,
        pseudo_labels.probabilities.amax(1),
        used=mask,
        images=len(targets),
        empty=(~mask).sum(),
        right=None if truth is None else targets == truth,
        judged=None if truth is None else truth >= 0,
        objects=truth,
    )
