"""The last stages of a network, trained on cached maps of its first ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.config.options import Options, option
from ssod_imwa.errors import WeightsError

NAME = "feature_tail"
_PARTS = ("conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "num_features")


@dataclass(frozen=True)
class FeatureTailOptions(Options):
    """Where a network is cut."""

    network: str = option(
        "tf_efficientnet_lite0",
        "timm's name of the network that made the cached maps, an EfficientNet or MobileNetV2",
    )
    cached_stages: int = option(5, "stages that made them; the others are trained", low=1)


def check_stages(network: Any, stages: int, name: str) -> None:
    """Raise ValueError unless a network of timm has more stages than these, one after the other."""
    if not all(hasattr(network, part) for part in _PARTS):
        raise ValueError(f"{name} is not allowed (must be an EfficientNet or MobileNetV2 of timm)")
    if not 1 <= stages < len(network.blocks):
        raise ValueError(
            f"{stages} stages of {name} are not allowed (must be 1..{len(network.blocks) - 1})"
        )


def first_stages(network: Any, stages: int) -> nn.Sequential:
    """Stem and first stages of a network of timm: images (B, 3, H, W) to maps (B, c, h, w)."""
    return nn.Sequential(network.conv_stem, network.bn1, *network.blocks[:stages])


class FeatureTail(ImageClassifier):
    """The stages of a network behind the cached ones, and a classifier of ours.

    With the first stages frozen, batch norms too, their maps of an image never change: training the
    others on cached maps is fine-tuning the network, but for the maps' rounding to float16.

    Args:
        classes: C.
        options: which network, and how many stages made the maps (B, c, h, w).
        classifier: "linear" or a cosine.
        scale: of the cosine classifier.

    Raises:
        ValueError: timm has no such network, or it cannot be cut there.

    Example:
        >>> tail = FeatureTail(10)
        >>> tail.group_names, tail(torch.zeros(2, 112, 4, 4)).shape
        (('stages.5', 'stages.6', 'top'), torch.Size([2, 10]))
    """

    def __init__(
        self,
        classes: int,
        options: FeatureTailOptions = FeatureTailOptions(),
        *,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        self.options = options
        try:
            network: Any = timm.create_model(options.network, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"network = {options.network!r} is not allowed ({error})") from error
        check_stages(network, options.cached_stages, options.network)
        self.stages = network.blocks[options.cached_stages :]  # which keep their numbers
        self.top = nn.Sequential(OrderedDict(conv_head=network.conv_head, bn2=network.bn2))
        self.group_names = (*(f"stages.{i}" for i, _ in self.stages.named_children()), "top")
        self.num_features = network.num_features
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)

    def load_library_weights(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """Take the weights of the whole network, as timm names them, that belong to these stages.

        Raises:
            WeightsError: they are of another network.
        """
        own = {
            name: name.replace("stages.", "blocks.").removeprefix("top.")
            for name in self.state_dict()
            if not name.startswith("classifier.")
        }
        missing = sorted(x for x in own.values() if x not in state and "num_batches" not in x)
        if missing:
            raise WeightsError(
                f"{source} is of another network than CLS.MODEL.NETWORK {self.options.network} "
                f"(it has no {missing[0]})"
            )
        try:
            state = {name: state[library] for name, library in own.items() if library in state}
            self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise WeightsError(f"{source} is of another network: {first}") from error
