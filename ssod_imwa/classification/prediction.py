"""Logits of a data set, and the metrics of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.evaluation import class_recalls, classification_metrics
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.config.options import Options, option
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.data.polling import Poll, polled
from ssod_imwa.errors import NonFiniteError

# Recalls of more classes than this would make results.json megabytes long.
MOST_RECALLS = 200
COUNTS = ("zero_recall_classes",)  # all other metrics are percent
FLIPPED = "flipped/"
ADJUSTED = "adjusted/"  # before the names of metrics after post-hoc logit adjustment


@dataclass(frozen=True)
class FlipOptions(Options):
    """How test images are judged a second time."""

    flip: bool = option(
        False,
        "judge the mean of each test image's logits and those of its mirror image, too "
        "(flipped/top1, ...; ECL); takes twice the time",
        free=True,
    )


@dataclass(frozen=True)
class PostHocOptions(Options):
    """How logits are judged a second time."""

    post_hoc_tau: float = option(
        0.0,
        "judge logits minus this times the log prior of the training images, too (adjusted/top1, "
        "adjusted/mean_recall; post-hoc logit adjustment); 0 does not",
        low=0,
        free=True,
    )


def predict(
    model: nn.Module,
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    poll: Poll | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every image of a data set, and its labels, in the data set's order.

    Args:
        model: in eval mode; images (B, 3, H, W) to logits (B, C), or to (..., B, C).
        batches: of this process, see `build_test_batches`.
        processes: those that have the other images.
        poll: see `polled`.

    Returns:
        float32 (N, C) or (..., N, C), and int64 (N,), the same in every process.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
    """
    _, logits, labels = predict_readable(model, batches, processes, poll=poll)
    return logits, labels


@torch.no_grad()
def predict_readable(
    model: nn.Module,
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    poll: Poll | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the data set, int64 (N,), ascending, and logits and labels of `predict`.

    Images that the batches leave out, as they cannot be read, are missing among the positions.

    Args:
        model: see `predict`.
        batches: see `predict`.
        processes: see `predict`.
        poll: see `predict`.

    Raises:
        NonFiniteError: see `predict`.
    """
    parts = []
    device = next(model.parameters()).device
    for batch in polled(batches, processes, poll):
        logits = model(batch.views["image"].to(device, non_blocking=True)).float().cpu()
        parts.append((batch.indices.cpu(), batch.targets.cpu(), logits))
    gathered = [part for of_process in processes.all_gather(parts) for part in of_process]
    positions, order = torch.cat([indices for indices, _, _ in gathered]).sort()
    labels = torch.cat([labels for _, labels, _ in gathered])[order]
    logits = torch.cat([logits for _, _, logits in gathered], dim=-2)
    is_wrong = (~logits.isfinite()).any(-1).reshape(-1, len(labels)).any(0)  # of some expert
    if is_wrong.any():
        raise NonFiniteError(
            f"logits of {int(is_wrong.sum())} of {len(labels)} images are not finite: the weights "
            "are too large for the network (lower SOLVER.BASE_LR)"
        )
    return positions.numpy(), logits.index_select(-2, order).numpy(), labels.numpy()


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
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    classes: Sequence[str],
    train_counts: Sequence[int],
    group_rule: str = "standard",
    flip: bool = False,
    post_hoc_tau: float = 0.0,
    poll: Poll | None = None,
) -> dict[str, float]:
    """The metrics of a classifier in percent, see `evaluate_logits`.

    Several experts are judged by their mean logits; each one's accuracy is "expert1/top1", ..., and
    their mean "experts/top1". With `flip` all of that but the recalls of classes is there a second
    time as "flipped/top1", ..., of the mean of an image's logits and its mirror image's. With
    `post_hoc_tau` above 0 "adjusted/top1" and "adjusted/mean_recall" are of z − τ log π.
    """
    of_logits = partial(
        evaluate_logits, classes=classes, train_counts=train_counts, group_rule=group_rule
    )
    if post_hoc_tau > 0:
        shift = post_hoc_tau * log_prior(train_counts).numpy()
        of_logits = partial(_with_adjusted, of_logits=of_logits, shift=shift)
    network = deployed(model)
    seen = _EachExpert(network) if isinstance(network, Experts) else model
    if not flip:
        return _judge(*predict(seen, batches, processes, poll=poll), of_logits)
    logits, labels = predict(_WithMirrorImage(seen), batches, processes, poll=poll)
    flipped = _judge(logits.mean(0), labels, of_logits)
    mirrored = {f"{FLIPPED}{k}": x for k, x in flipped.items() if not k.startswith("recall-")}
    return {**_judge(logits[0], labels, of_logits), **mirrored}


def _with_adjusted(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    of_logits: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    shift: np.ndarray,
) -> dict[str, float]:
    """The metrics of logits (N, C), and the two main ones of logits less a shift (C,)."""
    adjusted = of_logits(logits - shift, labels)
    main = {f"{ADJUSTED}{name}": adjusted[name] for name in ("top1", "mean_recall")}
    return {**of_logits(logits, labels), **main}


def _judge(
    logits: np.ndarray,
    labels: np.ndarray,
    of_logits: Callable[[np.ndarray, np.ndarray], dict[str, float]],
) -> dict[str, float]:
    """The metrics of logits (N, C), or of experts' (K, N, C)."""
    if logits.ndim == 2:
        return of_logits(logits, labels)
    metrics = of_logits(logits.mean(0), labels)
    single = [100 * float((of_expert.argmax(1) == labels).mean()) for of_expert in logits]
    metrics |= {f"expert{k}/top1": value for k, value in enumerate(single, start=1)}
    return {**metrics, "experts/top1": float(np.mean(single))}


class _EachExpert(nn.Module):
    def __init__(self, network: Experts) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.expert_logits(images)


class _WithMirrorImage(nn.Module):
    """Logits of the images and of their mirror images, (2, ...)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.network(images), self.network(images.flip(-1))])
