"""Logits of a data set, and the metrics of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.evaluation import class_recalls, classification_metrics
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.data.batches import Part

# Recalls of more classes than this would make results.json megabytes long.
MOST_RECALLS = 200
COUNTS = ("zero_recall_classes",)  # all other metrics are percent


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Part],
    processes: Group = Group(),
    *,
    poll: Callable[[], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every image of a data set, and its labels, in the data set's order.

    Args:
        model: in eval mode; images (B, 3, H, W) to logits (B, C), or to (K, B, C).
        batches: of this process, see `build_test_batches`.
        processes: those that have the other images.
        poll: called once a batch; may raise to leave the loop.

    Returns:
        float32 (N, C) or (K, N, C), and int64 (N,), the same in every process.
    """
    parts = []
    device = next(model.parameters()).device
    for batch in batches:
        if poll is not None:
            poll()
        logits = model(batch.views["image"].to(device, non_blocking=True)).float().cpu()
        parts.append((batch.indices.cpu(), batch.targets.cpu(), logits))
    gathered = [part for of_process in processes.all_gather(parts) for part in of_process]
    order = torch.cat([indices for indices, _, _ in gathered]).argsort()
    labels = torch.cat([labels for _, labels, _ in gathered])[order]
    logits = torch.cat([logits for _, _, logits in gathered], dim=-2)
    return logits.index_select(-2, order).numpy(), labels.numpy()


def evaluate_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    train_counts: Sequence[int],
    group_rule: str = "standard",
) -> dict[str, float]:
    """The metrics of `classification_metrics` in percent, and the recall of each class.

    Args:
        logits: (N, C).
        labels: (N,).
        classes: names.
        train_counts: training images of each class.
        group_rule: see `group_accuracies`.

    Returns:
        `zero_recall_classes` is a number of classes, all else percent; "recall-NAME" for each class
        if there are at most 200.
    """
    probabilities = torch.from_numpy(logits).double().softmax(1).numpy()
    metrics = classification_metrics(
        probabilities, labels, train_counts=train_counts, group_rule=group_rule
    )
    metrics = {name: x if name in COUNTS else 100 * x for name, x in metrics.items()}
    if len(classes) <= MOST_RECALLS:
        recalls = class_recalls(logits.argmax(1), labels, classes=len(classes))
        metrics |= {f"recall-{c}": 100 * float(r) for c, r in zip(classes, recalls, strict=True)}
    return metrics


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Part],
    processes: Group = Group(),
    *,
    classes: Sequence[str],
    train_counts: Sequence[int],
    group_rule: str = "standard",
    poll: Callable[[], object] | None = None,
) -> dict[str, float]:
    """The metrics of a classifier in percent, see `evaluate_logits`.

    Several experts are judged by their mean logits; each one's accuracy is "expert1/top1", ..., and
    their mean "experts/top1".
    """
    judge = partial(
        evaluate_logits, classes=classes, train_counts=train_counts, group_rule=group_rule
    )
    network = deployed(model)
    if not isinstance(network, Experts):
        logits, labels = predict(model, batches, processes, poll=poll)
        return judge(logits, labels)
    of_experts, labels = predict(_EachExpert(network), batches, processes, poll=poll)
    metrics = judge(of_experts.mean(0), labels)
    single = [100 * float((logits.argmax(1) == labels).mean()) for logits in of_experts]
    metrics |= {f"expert{k}/top1": value for k, value in enumerate(single, start=1)}
    return {**metrics, "experts/top1": float(np.mean(single))}


class _EachExpert(nn.Module):
    def __init__(self, network: Experts) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.expert_logits(images)
