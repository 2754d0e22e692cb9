"""What every network that classifies images has in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn


class ImageClassifier(nn.Module):
    """Groups of layers in turn, a pool, and a classifier: images (B, 3, H, W) to logits (B, C).

    A subclass sets `num_features` and `classifier` and registers the groups under `group_names`.

    Attributes:
        group_names: stem and stages, in order, as `get_submodule` finds them; the places between
            which methods mix features (MFW, manifold mixup).
        library_names: prefix of a weight's name -> its prefix in the library that the network
            comes from, see `models.weights`.
        unused: layers that take no part in a forward pass, whose parameters are never trained.
        num_features: d, the width of the features.
        classifier: features (B, d) -> logits (B, C).

    Example:
        >>> class Small(ImageClassifier):
        ...     group_names = ("stem",)
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.num_features = 8
        ...         self.stem = nn.Conv2d(3, 8, 3)
        ...         self.classifier = nn.Linear(8, 5)
        >>> Small()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    group_names: tuple[str, ...] = ()
    library_names: Mapping[str, str] = {}
    unused: tuple[nn.Module, ...] = ()
    num_features: int
    classifier: nn.Module

    @property
    def groups(self) -> tuple[nn.Module, ...]:
        """Stem and stages, in order."""
        return tuple(self.get_submodule(name) for name in self.group_names)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of the last group's maps (B, d, h, w)."""
        return maps.mean((2, 3))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, d), d = `num_features`, of normalized images (B, 3, H, W)."""
        for group in self.groups:
            images = group(images)
        return self.pool(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))

    def initialize(self, part: nn.Module) -> None:
        """Draw the weights of a part whose layers have their own initial values already."""

    def redraw(self, part: nn.Module) -> None:
        """Draw the weights of a part anew, statistics of batch norms included."""
        for module in part.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self.initialize(part)

    def new_classifier(self) -> nn.Module:
        """A classifier of the same shape as this one's, with weights drawn anew."""
        classifier = copy.deepcopy(self.classifier)
        self.redraw(classifier)
        return classifier
