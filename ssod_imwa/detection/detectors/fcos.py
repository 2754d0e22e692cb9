"""FCOS on a feature pyramid, made of torchvision's parts.

The parameter names are those of `torchvision.models.detection.FCOS`, beside a scale for each level,
so that weights move to it (`dense_export.py`). What differs from torchvision's own model is what
Dense Teacher trains: the scales, a quality branch that learns the IoU, losses divided by the
positive locations of all ranks, candidates by class probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.dense import (
    DenseParts,
    check_groups,
    make_dense_backbone,
    one_hot_targets,
)
from ssod_imwa.detection.detectors.dense_export import fcos_loading_code
from ssod_imwa.detection.detectors.locations import (
    Locations,
    assign_locations,
    centerness,
    grid_locations,
)
from ssod_imwa.detection.detectors.options import FCOSHeadOptions, FCOSOptions
from ssod_imwa.detection.detectors.parts import DenseMaps
from ssod_imwa.detection.detectors.torchvision_detector import (
    TorchvisionDetector,
    check_lengths,
    check_options,
)
from ssod_imwa.detection.losses import aligned_iou, check_gamma
from ssod_imwa.errors import UserError

FIRST_DISTANCE = 1.0  # from a point to each side of its first box, in strides


class ScaledRegressionHead(FCOSRegressionHead):
    """torchvision's with a learned factor for each level; its outputs are float32.

    Source: FCOS (arXiv 1904.01355, section 3.2), with ReLU in place of the exponential, and a bias
    with which all four distances begin above 0: torchvision's 0 leaves a side to chance.
    """

    def __init__(self, channels: int, num_convs: int, levels: int) -> None:
        super().__init__(channels, 1, num_convs)
        self.scales = nn.Parameter(torch.ones(levels))
        # A ReLU that is negative everywhere learns no more, and boxes end at their point on that
        # side: one run of three on digits had AP 18 in place of 51 and 55.
        nn.init.constant_(self.bbox_reg.bias, FIRST_DISTANCE)

    def forward(self, x: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        distances, quality = [], []
        for features, scale in zip(x, self.scales, strict=True):
            tower = self.conv(features)
            raw = self.bbox_reg(tower).float()
            distances.append(F.relu(scale * raw).flatten(2).mT)
            quality.append(self.bbox_ctrness(tower).float().flatten(1))
        return torch.cat(distances, dim=1), torch.cat(quality, dim=1)


class FCOSHead(nn.Module):
    """Two towers shared by all levels, one for classes, one for boxes and their quality.

    Args:
        channels: of the features, a multiple of 32.
        num_classes: C.
        num_convs: convolutions of a tower.
        levels: number of levels.
        prior_prob: class probability that training starts from.
    """

    def __init__(
        self, channels: int, num_classes: int, *, num_convs: int, levels: int, prior_prob: float
    ) -> None:
        super().__init__()
        self.classification_head = FCOSClassificationHead(
            channels, 1, num_classes, num_convs, prior_prob
        )
        self.regression_head = ScaledRegressionHead(channels, num_convs, levels)

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, N, C), distances to the edges in strides (B, N, 4), quality logits (B, N)."""
        logits = self.classification_head(features).float()
        return logits, *self.regression_head(features)


class TorchvisionFCOS(TorchvisionDetector):
    """FCOS with random weights; `load_weights` fills them.

    Args:
        options: None takes all defaults: a ResNet-50 whose batch norms are frozen, for images of
            COCO's size.
        num_classes: C.

    Raises:
        ValueError: values are out of range or do not fit together.

    Example:
        >>> from ssod_imwa.detection.detectors.options import BackboneOptions, ResNetOptions
        >>> options = FCOSOptions(
        ...     backbone=BackboneOptions(freeze_at=0), resnets=ResNetOptions(depth=18, norm="BN")
        ... )
        >>> detector = TorchvisionFCOS(options, num_classes=10)
        >>> detector.dense_maps([torch.zeros(3, 64, 96, dtype=torch.uint8)]).levels
        (96, 24, 6, 2, 1)
    """

    abilities = frozenset({"dense"})
    classifier = "head.classification_head.cls_logits.weight"
    options: FCOSOptions

    def __init__(self, options: FCOSOptions | None = None, *, num_classes: int) -> None:
        options = options or FCOSOptions()
        _check(options, num_classes)
        # Before the backbone: the order decides the random weights that a seed gives.
        head = FCOSHead(
            options.fpn.out_channels,
            num_classes,
            num_convs=options.fcos.num_convs,
            levels=len(options.levels.strides),
            prior_prob=options.fcos.prior_prob,
        )
        super().__init__(make_dense_backbone(options), options, num_classes=num_classes)
        self.head = head

    @property
    def name(self) -> str:
        return "torchvision's FCOS"

    def parts(self, images: Sequence[torch.Tensor]) -> FCOSParts:
        return FCOSParts(self, images)

    def export(self, path: Path, *, min_size: int, max_size: int, about: Mapping[str, Any]) -> str:
        """Write a state dict that plain torchvision loads; the scales are in the printed lines.

        Raises:
            UserError: a scale is not above 0.
        """
        scales = self.head.regression_head.scales.tolist()
        if min(scales) <= 0:
            raise UserError(
                f"{self.name} cannot be exported (the scale of a level is not positive, which "
                "plain torchvision cannot express)"
            )
        without = {"head.regression_head.scales"}
        self.write_state(path, min_size=min_size, max_size=max_size, about=about, without=without)
        return fcos_loading_code(
            self.options,
            self.num_classes,
            str(path),
            scales=scales,
            min_size=min_size,
            max_size=max_size,
        )


class FCOSParts(DenseParts):
    """The detector at work on some images."""

    at_most_locations = True
    _options: FCOSHeadOptions

    def __init__(self, detector: TorchvisionFCOS, images: Sequence[torch.Tensor]) -> None:
        super().__init__(detector, images, detector.options.fcos)
        self._head, self._num_classes = detector.head, detector.num_classes
        self._strides = detector.options.levels.strides

    @cached_property
    def _locations(self) -> Locations:
        sizes = [(level.shape[-2], level.shape[-1]) for level in self._features]
        return grid_locations(sizes, self._strides, self._batch.tensors.device)

    @cached_property
    def _maps(self) -> DenseMaps:
        logits, distances, quality = self._head(self._features)
        start, end = (distances * self._locations.strides[:, None]).split(2, dim=2)
        points = self._locations.points
        boxes = torch.cat([points - start, points + end], dim=2)
        return DenseMaps(logits, boxes, quality, self._locations.levels)

    def losses(self, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
        self.check_count("targets", targets)
        assigned = [
            assign_locations(
                self._locations,
                target,
                bounds=self._options.sizes_of_interest,
                radius=self._options.center_sampling_radius,
                num_classes=self._num_classes,
            )
            for target in targets
        ]
        labels = torch.stack([item.labels for item in assigned])
        boxes = torch.stack([item.boxes for item in assigned])
        maps, positive = self._maps, labels < self._num_classes
        divisor = self._divisor(positive)
        focal = sigmoid_focal_loss(
            maps.logits,
            one_hot_targets(maps.logits, labels),
            alpha=self._options.focal_loss_alpha,
            gamma=self._options.focal_loss_gamma,
            reduction="sum",
        )
        predicted, wanted = maps.boxes[positive], boxes[positive]
        overlap = generalized_box_iou_loss(predicted, wanted, reduction="sum")
        name, qualities = self._qualities(positive, predicted.detach(), wanted)
        assert maps.quality is not None
        quality = F.binary_cross_entropy_with_logits(
            maps.quality[positive], qualities, reduction="sum"
        )
        return {
            "loss_cls": focal / divisor,
            "loss_box_reg": overlap / divisor,
            name: quality / divisor,
        }

    def _qualities(
        self, positive: torch.Tensor, predicted: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[str, torch.Tensor]:
        """The name of the quality loss and what the quality of positive locations is to be."""
        if self._options.quality == "iou":
            return "loss_quality", aligned_iou(predicted, wanted)
        points = self._locations.points.expand(len(positive), -1, -1)[positive]
        return "loss_centerness", centerness(points, wanted)


def _check(options: FCOSOptions, num_classes: int) -> None:
    """Raise ValueError where single values are allowed but not together."""
    check_options(options, num_classes)
    check_gamma(options.fcos.focal_loss_gamma)
    sizes = options.fcos.sizes_of_interest
    check_lengths({"sizes_of_interest": (sizes, len(options.levels.strides) - 1)})
    if sizes != sorted(sizes):
        raise ValueError(f"sizes_of_interest = {sizes} is not allowed (must be ascending)")
    check_groups(options.fpn.out_channels)
