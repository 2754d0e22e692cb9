"""The ResNet-12 of few-shot learning, for 84 x 84 images (MetaOptNet, Lee et al., 1904.03758)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.checks import check_at_least_1
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import ClassifierKind, make_classifier

WIDTHS = (64, 160, 320, 640)
SLOPE = 0.1  # of the leaky ReLU for negative values
RAMP = 40_000  # steps over which DropBlock drops more and more


class DropBlock(nn.Module):
    """Sets squares of the maps to 0 in training, more of them as training goes on.

    The part that is dropped grows linearly over the first 40 000 steps, which a buffer counts.

    Args:
        part: of the map that is dropped in the end, 0..1.
        size: of a square; cut to the map.

    Raises:
        ValueError: an argument is out of range.

    Source: DropBlock (Ghiasi et al., arXiv 1810.12890).
    """

    num_batches_tracked: torch.Tensor

    def __init__(self, part: float, size: int) -> None:
        super().__init__()
        if not 0 <= part < 1:
            raise ValueError(f"part = {part} is not allowed (must be 0 or more, below 1)")
        check_at_least_1(size=size)
        self.part = part
        self.size = size
        # Batch norm's name: members under IMWA may disagree about it, and the largest is taken.
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not self.training or self.part == 0:
            return maps
        self.num_batches_tracked += 1
        height, width = maps.shape[2:]
        size = min(self.size, height, width)
        part = self.part * (self.num_batches_tracked / RAMP).clamp(max=1)
        # So many corners that `part` of the map is dropped, where squares do not overlap.
        places = (height - size + 1) * (width - size + 1)
        corners = part * height * width / (size**2 * places)
        drawn = torch.rand(
            (*maps.shape[:2], height - size + 1, width - size + 1), device=maps.device
        )
        dropped = F.pad((drawn < corners).float(), [size - 1] * 4)
        mask = 1 - F.max_pool2d(dropped, size, stride=1)
        return maps * (mask * (mask.numel() / mask.sum().clamp(min=1))).to(maps.dtype)


class Block(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 one, then max-pooling by 2 and dropping."""

    def __init__(self, in_channels: int, channels: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.drop = drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        inner = F.leaky_relu(self.bn2(self.conv2(inner)), SLOPE)
        inner = self.bn3(self.conv3(inner))
        maps = F.leaky_relu(inner + self.shortcut(x), SLOPE)
        return self.drop(F.max_pool2d(maps, 2))


class ResNet12(ImageClassifier):
    """Four blocks of 64, 160, 320 and 640 channels, each of which halves the maps.

    Without a stem: the blocks are the groups. Features are the mean over the last map. The first
    two blocks drop single numbers, the last two squares (`DropBlock`).

    Args:
        classes: C, outputs of the classifier.
        drop: the part of the maps that is dropped in training, 0..1.
        block_size: of DropBlock's squares.
        classifier: "linear" or "cosine".
        scale: of the cosine classifier.

    Raises:
        ValueError: `drop` or `block_size` is out of range, or see `make_classifier`.

    Example:
        >>> model = ResNet12(351)
        >>> model(torch.zeros(1, 3, 84, 84)).shape, model.num_features
        (torch.Size([1, 351]), 640)
    """

    group_names = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        classes: int,
        *,
        drop: float = 0.1,
        block_size: int = 5,
        classifier: ClassifierKind = "linear",
        scale: float = 30.0,
    ) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ValueError(f"drop = {drop} is not allowed (must be 0 or more, below 1)")
        self.num_features = WIDTHS[-1]
        self.layer1 = Block(3, WIDTHS[0], nn.Dropout(drop))
        self.layer2 = Block(WIDTHS[0], WIDTHS[1], nn.Dropout(drop))
        self.layer3 = Block(WIDTHS[1], WIDTHS[2], DropBlock(drop, block_size))
        self.layer4 = Block(WIDTHS[2], WIDTHS[3], DropBlock(drop, block_size))
        self.classifier = make_classifier(classifier, self.num_features, classes, scale=scale)
        self.initialize(self)

    def initialize(self, part: nn.Module) -> None:
        """Kaiming's normal weights by the outputs for convolutions."""
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")


def _conv(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
