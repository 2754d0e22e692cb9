"""The ResNets for 32 x 32 images (He et al., arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters (option A).

    Where the stride is 2 the shortcut takes every second pixel of every second row, and new
    channels are 0, half of them before and half after the old ones.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = _conv(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(inner + self._shortcut(x), inplace=True)

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(ImageClassifier):
    """A ResNet of depth 6n + 2: a stem and three stages of n blocks, 16, 32 and 64 channels wide.

    Args:
        classes: C, outputs of the classifier.
        depth: 20, 32, 44, 56, ...; long-tailed work uses 32 (0.46 million parameters).
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: the depth is not 6n + 2, or see `make_classifier`.

    Example:
        >>> model = CifarResNet(10, depth=8)
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> model(images).shape, model.features(images).shape
        (torch.Size([2, 10]), torch.Size([2, 64]))
    """

    group_names = ("stem", "layer1", "layer2", "layer3")

    def __init__(
        self,
        classes: int,
        *,
        depth: int = 32,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth = {depth} is not allowed (must be 6n + 2: 8, 14, 20, ..., 32)")
        blocks = (depth - 2) // 6
        self.num_features = WIDTHS[-1]
        self.stem = nn.Sequential(_conv(3, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(True))
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)
        self.initialize(self)

    def initialize(self, part: nn.Module) -> None:
        """Kaiming's normal weights, of the classifier, too."""
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


def _conv(in_channels: int, channels: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride=stride)
    return nn.Sequential(
        first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
    )
