"""What is recorded of pseudo-labels, and how right they are where the truth is known."""

from __future__ import annotations

import torch

from ssod_imwa.classification.labelers.base import PseudoLabels

# Classes of their own lines in metrics; more would make each row of metrics.json kilobytes long.
MOST_CLASSES = 20


@torch.no_grad()
def label_records(
    pseudo_labels: PseudoLabels, truth: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Percentages of the n unlabeled images of a batch, by name; scalars float32.

    Args:
        pseudo_labels: of the images.
        truth: int64 (n,), -1 where it is not known, or None; for these records alone, no loss sees
            it.

    Returns:
        `labels/mask_rate`: images that are learned; `labels/confidence`: mean confidence of all;
        with truth `labels/accuracy`: right ones among those that are learned (0 without any), and
        `labels/accuracy_all`: right ones among all. With at most 20 classes, for each class k, in
        percent of the images: `labels/learned-k`, those that are learned as k; `labels/right-k`,
        the right ones of them; and `labels/truth-k`, all that are k.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1.0, 0.0]])
        >>> labels = PseudoLabels(logits.argmax(1), torch.tensor([True, True, False]),
        ...                       logits.softmax(1), {})
        >>> records = label_records(labels, torch.tensor([0, 0, 0]))
        >>> records["labels/accuracy"], records["labels/right-0"]
        (tensor(50.), tensor(33.3333))
    """
    targets, mask, probabilities, own = pseudo_labels
    images, classes = probabilities.shape
    learned = mask.float()
    records = {
        **own,
        "labels/mask_rate": 100 * learned.mean(),
        "labels/confidence": 100 * probabilities.amax(1).mean(),
    }
    if truth is None:
        return records
    known = (truth >= 0).float()
    right = (targets == truth).float()
    records["labels/accuracy"] = _percent((right * learned).sum(), (known * learned).sum())
    records["labels/accuracy_all"] = _percent(right.sum(), known.sum())
    if classes > MOST_CLASSES:
        return records
    of_class = torch.nn.functional.one_hot(targets, classes).float()
    truth_of_class = (truth[:, None] == torch.arange(classes, device=truth.device)).float()
    shares = {
        "learned": learned @ of_class,
        "right": (learned * right) @ of_class,
        "truth": truth_of_class.sum(0),
    }
    for name, counts in shares.items():
        percent = 100 * counts / images
        records |= {f"labels/{name}-{k}": percent[k] for k in range(classes)}
    return records


def _percent(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return 100 * part / whole.clamp(min=1)
