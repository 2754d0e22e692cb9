"""torchvision's ResNets and ResNeXt as image classifiers."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights

from ssod_imwa.classification.checks import check_choice
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.classification.models.weights import load_encoder, renamed_from_library
from ssod_imwa.errors import WeightsError

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")


class TorchvisionResNet(ImageClassifier):
    """A ResNet of torchvision: a stem, four stages, average pooling and a classifier.

    `exported_state` (in `models.weights`) gives its weights the names that torchvision loads.

    Args:
        name: one of `NAMES`. Bottlenecks have their stride in the 3 x 3 convolution (v1.5).
        classes: C, outputs of the classifier.
        small_stem: a 3 x 3 convolution of stride 1 in place of the 7 x 7 of stride 2 with
            max-pooling, for images of 32 to 64 pixels.
        pretrained: begin with torchvision's first ImageNet weights (IMAGENET1K_V1), but for the
            classifier. They are downloaded once.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: the name is not known, there are no weights for a small stem, or see
            `make_classifier`.
        WeightsError: the ImageNet weights can be neither found nor downloaded, or are damaged.

    Example:
        >>> with torch.device("meta"):
        ...     model = TorchvisionResNet("resnet50", 1000)
        >>> sum(p.numel() for p in model.parameters()), model.num_features
        (25557032, 2048)
    """

    group_names = ("stem", "layer1", "layer2", "layer3", "layer4")
    library_names: Mapping[str, str] = {"stem.": "", "classifier.": "fc."}

    def __init__(
        self,
        name: str,
        classes: int,
        *,
        small_stem: bool = False,
        pretrained: bool = False,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        check_choice("name", name, NAMES)
        if small_stem and pretrained:
            raise ValueError(
                "pretrained = True is not allowed with small_stem (there are no such weights)"
            )
        source = get_model(name, weights=None, num_classes=1)
        self.num_features = source.fc.in_features
        self.stem = _small_stem() if small_stem else _stem(source)
        self.layer1, self.layer2 = source.layer1, source.layer2
        self.layer3, self.layer4 = source.layer3, source.layer4
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)
        if small_stem:  # the other layers come initialized
            self.initialize(self.stem)
        if pretrained:
            weights = renamed_from_library(self, _imagenet_state(name))
            load_encoder(self, weights, source=f"torchvision's {name}")

    def initialize(self, part: nn.Module) -> None:
        """Kaiming's normal weights by the outputs for convolutions, as torchvision has."""
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stem(source: nn.Module) -> nn.Sequential:
    names = ("conv1", "bn1", "relu", "maxpool")
    return nn.Sequential(OrderedDict((name, source.get_submodule(name)) for name in names))


def _small_stem() -> nn.Sequential:
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    layers = [("conv1", conv), ("bn1", nn.BatchNorm2d(64)), ("relu", nn.ReLU(inplace=True))]
    return nn.Sequential(OrderedDict(layers))


def _imagenet_state(name: str) -> Mapping[str, torch.Tensor]:
    # The first weights, as the papers used; the second ones came with another recipe in 2021.
    choice = get_model_weights(name).IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(choice.url).name
    try:
        return choice.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise WeightsError(
            f"{choice.url} cannot be fetched ({error}); download it elsewhere and save it as {file}"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file}: is damaged (delete it, to download it again)") from error
