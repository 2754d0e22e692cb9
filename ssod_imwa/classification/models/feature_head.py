"""A head on the cached features of a frozen network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.config.options import Options, option

NAME = "feature_head"


@dataclass(frozen=True)
class FeatureHeadOptions(Options):
    """The layers of a head."""

    width: int = option(1280, "features of an image in the file", low=1)
    hidden: int = option(0, "units of a hidden layer; 0 has none, the head is linear", low=0)


class FeatureHead(ImageClassifier):
    """A classifier of cached features (B, width), behind one hidden layer or none.

    Args:
        classes: C.
        options: width of the features and of the hidden layer.
        classifier: "linear" or a cosine.
        scale: of the cosine classifier.

    Example:
        >>> head = FeatureHead(10, FeatureHeadOptions(width=8, hidden=4))
        >>> head.num_features, head(torch.zeros(2, 8)).shape
        (4, torch.Size([2, 10]))
    """

    group_names = ("hidden",)

    def __init__(
        self,
        classes: int,
        options: FeatureHeadOptions = FeatureHeadOptions(),
        *,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        self.num_features = options.hidden or options.width
        hidden = [nn.Linear(options.width, options.hidden), nn.ReLU()] if options.hidden else []
        self.hidden = nn.Sequential(*hidden)
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """The features (B, d), which have no place to pool over."""
        return maps
