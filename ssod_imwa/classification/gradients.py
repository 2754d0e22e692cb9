"""What a class's images would still change: gradients of the loss with respect to features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.features import class_means
from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.data.batches import Part


def gradient_norms(
    head: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The norm of each image's own gradient ∂ℓ/∂g(x) of cross-entropy.

    Args:
        head: features to logits (B, C); must not mix images, so batch norms are in eval mode.
        features: g(x), (B, ...).
        labels: (B,).

    Returns:
        float32 (B,).

    Source: MFW, section 3.2; for a linear head with weights W it is ‖Wᵀ(p − y)‖.

    Example:
        >>> features, labels = torch.zeros(1, 2), torch.tensor([0])
        >>> norms = gradient_norms(lambda x: x, features, labels)  # p − y = (−0.5, 0.5)
        >>> round(float(norms), 4)
        0.7071
    """
    with torch.enable_grad():
        leaves = features.detach().requires_grad_()
        # The sum: an image's loss depends on its own features only.
        loss = F.cross_entropy(head(leaves), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaves)
    return gradient.flatten(1).float().norm(dim=1)


@dataclass(frozen=True)
class Reaction:
    """How a network sees the images of a data set, and how much it would change for them.

    Attributes:
        norms: float32 (N,), ‖∂ℓ/∂g(x)‖.
        predictions: int64 (N,).
        labels: int64 (N,).
        features: float32 (N, d), pooled; of several experts side by side.
    """

    norms: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    features: np.ndarray


def measure_reaction(
    model: nn.Module,
    batches: Iterable[Part],
    processes: Group = Group(),
    *,
    group: str | None = None,
) -> Reaction:
    """Gradient norms, predictions and features of every image, in the data set's order.

    Args:
        model: a network or experts, in eval mode; nothing of it changes, gradients neither. Of
            experts, each has its own loss and gradient, and the norm is their mean.
        batches: of this process, not augmented and not mixed.
        processes: those that have the other images.
        group: of the network's groups, the one whose output is g(x), such as "layer1", after which
            MFW mixes; None takes the pooled features, which the classifier sees.

    Raises:
        ValueError: the network has no such group, or experts are asked for one.
    """
    network = deployed(model)
    device = next(network.parameters()).device
    parts = []
    for batch in batches:
        images, labels = batch.views["image"].to(device), batch.targets.to(device)
        norms, features, logits = _react(network, images, labels, group)
        of_batch = (batch.indices, batch.targets, norms, logits.argmax(1), features.float())
        parts.append(tuple(tensor.cpu() for tensor in of_batch))
    gathered = [part for of_process in processes.all_gather(parts) for part in of_process]
    indices, labels, norms, predictions, features = (
        torch.cat([part[i] for part in gathered]) for i in range(5)
    )
    order = indices.argsort()
    return Reaction(*(x[order].numpy() for x in (norms, predictions, labels, features)))


def _react(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, group: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms (B,), pooled features (B, d) and logits (B, C)."""
    if isinstance(network, Experts):
        if group is not None:
            raise ValueError(f"group = {group!r} is not allowed with experts (must be None)")
        with torch.no_grad():
            of_experts = network.expert_features(images)
            pairs = list(zip(network.experts, of_experts, strict=True))
            logits = torch.stack([expert.classifier(rows) for expert, rows in pairs]).mean(0)
        norms = torch.stack(
            [gradient_norms(expert.classifier, rows, labels) for expert, rows in pairs]
        )
        return norms.mean(0), torch.cat(of_experts, 1), logits
    assert isinstance(network, ImageClassifier)
    done = _groups_up_to(network, group)
    with torch.no_grad():
        maps = images
        for layers in network.groups[:done]:
            maps = layers(maps)
        features = network.features(images) if group is None else _pooled(network, maps, done)
        logits = network.classifier(features)
    if group is None:
        return gradient_norms(network.classifier, features, labels), features, logits
    norms = gradient_norms(lambda x: network.classifier(_pooled(network, x, done)), maps, labels)
    return norms, features, logits


def _groups_up_to(network: ImageClassifier, group: str | None) -> int:
    if group is None:
        return 0
    if group not in network.group_names:
        raise ValueError(
            f"group = {group!r} is not allowed (must be one of {list(network.group_names)})"
        )
    return network.group_names.index(group) + 1


def _pooled(network: ImageClassifier, maps: torch.Tensor, done: int) -> torch.Tensor:
    for layers in network.groups[done:]:
        maps = layers(maps)
    return network.pool(maps)


@dataclass(frozen=True)
class ClassReaction:
    """Of each class c, as MFW's figures 1, 3 and 4 show it.

    Attributes:
        accuracy: (C,) share of its images that are predicted as it.
        gradient_norm: (C,) mean of ‖∂ℓ/∂g(x)‖ over its images.
        ratio: (C,) images predicted as c over images of c: above 1 for classes that draw others.
    """

    accuracy: np.ndarray
    gradient_norm: np.ndarray
    ratio: np.ndarray


def by_class(reaction: Reaction, *, classes: int) -> ClassReaction:
    """The means of each class, nan for a class without images.

    Example:
        >>> none = np.zeros((3, 0))
        >>> labels, predictions = np.array([0, 0, 1]), np.array([0, 0, 0])
        >>> seen = Reaction(np.array([1.0, 3.0, 2.0]), predictions, labels, none)
        >>> classes = by_class(seen, classes=2)
        >>> classes.accuracy, classes.gradient_norm, classes.ratio
        (array([1., 0.]), array([2., 2.]), array([1.5, 0. ]))
    """
    labels, predictions = reaction.labels, reaction.predictions
    counts = np.bincount(labels, minlength=classes)
    return ClassReaction(
        accuracy=class_means(predictions == labels, labels, classes=classes),
        gradient_norm=class_means(reaction.norms, labels, classes=classes),
        ratio=np.bincount(predictions, minlength=classes) / np.where(counts > 0, counts, np.nan),
    )
