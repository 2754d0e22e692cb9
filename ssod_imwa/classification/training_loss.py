"""The loss of a network on some of the images that it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ssod_imwa.classification.methods.base import deployed
from ssod_imwa.classification.methods.mae import reconstruction_error
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.data.batches import Part
from ssod_imwa.engine.modes import undisturbed


def spread_over_classes(labels: Sequence[int] | np.ndarray, images: int) -> np.ndarray:
    """Positions of images among which classes are as equal as can be, in ascending order.

    Of a long tail's images a plain sample would hold the head alone.

    Args:
        labels: (N,), class of each image.
        images: how many positions; all N if there are no more.

    Example:
        >>> spread_over_classes([0, 0, 0, 0, 1, 2], 4).tolist()
        [0, 1, 4, 5]
    """
    labels = np.asarray(labels)
    rank = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        rank[positions] = np.arange(len(positions))
    return np.sort(np.argsort(rank, kind="stable")[:images])


@torch.no_grad()
def training_loss(model: nn.Module, batches: Sequence[Part]) -> float:
    """Mean cross-entropy in nats in eval mode; of an autoencoder its reconstruction error.

    The method's own loss (prior-adjusted logits, mixed labels, contrast) would not be comparable
    between methods. Modes and random generators are afterwards as before.

    Args:
        model: a network to classify with, or one that holds it.
        batches: labeled images in one view with the name "image"; at least one.
    """
    with undisturbed(model):
        if isinstance(model, MaskedAutoencoder):
            return reconstruction_error(model, batches)["reconstruction_error"]
        network = deployed(model)
        device = next(model.parameters()).device
        total = 0.0
        for batch in batches:
            logits = network(batch.views["image"].to(device)).float()
            targets = batch.targets.to(device)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / sum(len(batch) for batch in batches)
