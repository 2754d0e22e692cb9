"""Wide ResNets (Zagoruyko and Komodakis, arXiv 1605.07146) as in FixMatch and its successors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier
from ssod_imwa.config.options import Options, option

STEM_WIDTH = 16
SLOPE = 0.1  # of the leaky ReLU for negative values
PreActivation = Literal["first", "raw"]


@dataclass(frozen=True)
class WideResNetOptions(Options):
    """In what the public codes' networks of one name differ."""

    bn_momentum: float = option(
        0.001,
        "momentum of batch norm as PyTorch counts it; 0.001 in FixMatch's PyTorch code and ACR, "
        "0.1 in DASO",
        above=0,
        high=1,
    )
    pre_activation: PreActivation = option(
        "first",
        "what the first convolution of the second and third stage sees: the normalized and "
        "activated input (DASO, FixMatch in TensorFlow), or the raw one (FixMatch in PyTorch, ACR)",
    )


class PreActivationUnit(nn.Module):
    """Batch norm, activation and 3 x 3 convolution, twice, beside a shortcut.

    Where the width changes the shortcut is a 1 x 1 convolution.

    Args:
        in_channels: of the input.
        channels: of the output.
        stride: of the first convolution and the shortcut.
        momentum: of batch norm.
        activate_shortcut: whether the first normalization and activation come before the shortcut
            branches off.
        raw: leave the first normalization and activation out, though not its parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int,
        momentum: float,
        activate_shortcut: bool,
        raw: bool = False,
    ) -> None:
        super().__init__()
        self.activate_shortcut = activate_shortcut
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(in_channels, momentum=momentum)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = in_channels == channels and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = x if self.raw else F.leaky_relu(self.bn1(x), SLOPE, inplace=True)
        inner = self.conv2(F.leaky_relu(self.bn2(self.conv1(active)), SLOPE, inplace=True))
        return inner + self.shortcut(active if self.activate_shortcut else x)


class WideResNet(ImageClassifier):
    """A wide ResNet of depth 6n + 4: a stem of 16 channels and three stages of n units.

    The stages are 16k, 32k and 64k wide. Only the very first unit branches its shortcut off after
    the activation, as in FixMatch's code.

    Args:
        classes: C, outputs of the classifier.
        depth: 28 in semi-supervised work.
        width: k; 2 in most papers, 8 in some of CIFAR-100's numbers.
        options: momentum of batch norm, and what the first convolution of the second and third
            stage sees. With "raw" their first batch norms are there, so that names and the number
            of parameters are the public codes', but nothing uses or trains them: those codes
            throw what they compute away.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: the depth is not 6n + 4, or see `make_classifier`.

    Example:
        >>> model = WideResNet(10, depth=10, width=1)
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> model(images).shape, model.features(images).shape
        (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    group_names = ("stem", "layer1", "layer2", "layer3")

    def __init__(
        self,
        classes: int,
        *,
        depth: int = 28,
        width: int = 2,
        options: WideResNetOptions = WideResNetOptions(),
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth = {depth} is not allowed (must be 6n + 4: 10, 16, ..., 28)")
        check_at_least_1(width=width)
        units = (depth - 4) // 6
        widths = [STEM_WIDTH * width * factor for factor in (1, 2, 4)]
        self.num_features = widths[-1]
        momentum, raw = options.bn_momentum, options.pre_activation == "raw"
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        self.layer1 = _stage(STEM_WIDTH, widths[0], units, 1, momentum, activate_shortcut=True)
        self.layer2 = _stage(widths[0], widths[1], units, 2, momentum, raw=raw)
        self.layer3 = _stage(widths[1], widths[2], units, 2, momentum, raw=raw)
        if raw:
            self.unused = tuple(
                self.get_submodule(f"{stage}.0.bn1") for stage in ("layer2", "layer3")
            )
        for layer in self.unused:
            layer.requires_grad_(False)
        self.bn = nn.BatchNorm2d(widths[2], momentum=momentum)
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)
        self.initialize(self)

    def initialize(self, part: nn.Module) -> None:
        """Kaiming's normal weights by the outputs, Xavier's for the classifier, as FixMatch has."""
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """Features (B, d) of the last group's maps (B, d, h, w), normalized and activated first."""
        return F.leaky_relu(self.bn(maps), SLOPE).mean((2, 3))


def _stage(
    in_channels: int,
    channels: int,
    units: int,
    stride: int,
    momentum: float,
    *,
    activate_shortcut: bool = False,
    raw: bool = False,
) -> nn.Sequential:
    first = PreActivationUnit(
        in_channels,
        channels,
        stride=stride,
        momentum=momentum,
        activate_shortcut=activate_shortcut,
        raw=raw,
    )
    others = (
        PreActivationUnit(channels, channels, stride=1, momentum=momentum, activate_shortcut=False)
        for _ in range(units - 1)
    )
    return nn.Sequential(first, *others)
