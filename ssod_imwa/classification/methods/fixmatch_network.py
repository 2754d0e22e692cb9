"""The network of FixMatch and what builds on it: an encoder with one head or two."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ssod_imwa.classification.methods.base import TrainingNetwork
from ssod_imwa.classification.models.base import ImageClassifier


class HeadOutputs(NamedTuple):
    """What heads say of N images.

    Attributes:
        features: (N, d).
        logits: (N, C), z of the head that FixMatch trains and labels with.
        tested_logits: (N, C) of the head that is tested, if it is another one.
    """

    features: torch.Tensor
    logits: torch.Tensor
    tested_logits: torch.Tensor | None

    def rows(self, first: int, last: int) -> HeadOutputs:
        """The outputs of images first..last-1."""
        tested = None if self.tested_logits is None else self.tested_logits[first:last]
        return HeadOutputs(self.features[first:last], self.logits[first:last], tested)


class FixMatchNetwork(TrainingNetwork):
    """A classifier, and with `two_heads` another head on its features that training alone needs.

    The deployed classifier is the one that is tested: ABC's or ACR's balanced head. The base head
    beside it, of the same kind with weights of its own, is FixMatch's.

    Args:
        deployed: the classifier.
        two_heads: whether there is a base head.

    Example:
        >>> from ssod_imwa.classification.models import WideResNet
        >>> network = FixMatchNetwork(WideResNet(10, depth=10, width=1), two_heads=True)
        >>> outputs = network(torch.zeros(2, 3, 32, 32))
        >>> outputs.logits.shape, outputs.tested_logits.shape
        (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    deployed: ImageClassifier

    def __init__(self, deployed: ImageClassifier, *, two_heads: bool = False) -> None:
        super().__init__(deployed)
        self.base_head = deployed.new_classifier() if two_heads else None

    def outputs(self, *inputs: torch.Tensor) -> HeadOutputs:
        (images,) = inputs
        features = self.deployed.features(images)
        logits = self.deployed.classifier(features)
        if self.base_head is None:
            return HeadOutputs(features, logits, None)
        return HeadOutputs(features, self.base_head(features), logits)
