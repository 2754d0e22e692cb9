"""RetinaNet on a feature pyramid p3..p7, made of torchvision's parts.

The parameter names are those of `torchvision.models.detection.RetinaNet`, so that weights move to
it (`dense_export.py`). What differs from torchvision's own model is how losses are divided: by the
positive anchors of the batch on all ranks, not image by image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
)
from torchvision.ops import box_iou, sigmoid_focal_loss

from ssod_imwa.detection.data.geometry import has_area
from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.anchors import StridedAnchors, anchor_shapes
from ssod_imwa.detection.detectors.dense import (
    DenseParts,
    check_groups,
    make_dense_backbone,
    one_hot_targets,
)
from ssod_imwa.detection.detectors.dense_export import retinanet_loading_code
from ssod_imwa.detection.detectors.locations import Assignment
from ssod_imwa.detection.detectors.options import RetinaNetHeadOptions, RetinaNetOptions
from ssod_imwa.detection.detectors.parts import DenseMaps
from ssod_imwa.detection.detectors.torchvision_detector import (
    TorchvisionDetector,
    check_lengths,
    check_options,
)
from ssod_imwa.detection.losses import check_gamma


class RetinaNetHead(nn.Module):
    """torchvision's two towers, whose outputs are float32.

    Args:
        channels: of the features; a multiple of 32 with GroupNorm.
        anchors: A, of a place.
        num_classes: C.
        norm: "" or "GN".
        prior_prob: class probability that training starts from.
    """

    def __init__(
        self, channels: int, anchors: int, num_classes: int, *, norm: str, prior_prob: float
    ) -> None:
        super().__init__()
        norm_layer = partial(nn.GroupNorm, 32) if norm == "GN" else None
        self.classification_head = RetinaNetClassificationHead(
            channels, anchors, num_classes, prior_prob, norm_layer
        )
        self.regression_head = RetinaNetRegressionHead(channels, anchors, norm_layer)

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, N, C) and box deltas (B, N, 4), place by place, A anchors each."""
        return self.classification_head(features).float(), self.regression_head(features).float()


class TorchvisionRetinaNet(TorchvisionDetector):
    """RetinaNet with random weights; `load_weights` fills them.

    Args:
        options: None takes all defaults: a ResNet-50 whose batch norms are frozen, nine anchors a
            place, for images of COCO's size.
        num_classes: C.

    Raises:
        ValueError: values are out of range or do not fit together.

    Example:
        >>> from ssod_imwa.detection.detectors.options import BackboneOptions, ResNetOptions
        >>> options = RetinaNetOptions(
        ...     backbone=BackboneOptions(freeze_at=0), resnets=ResNetOptions(depth=18, norm="BN")
        ... )
        >>> detector = TorchvisionRetinaNet(options, num_classes=10)
        >>> detector.dense_maps([torch.zeros(3, 64, 96, dtype=torch.uint8)]).levels
        (864, 216, 54, 18, 9)
    """

    abilities = frozenset({"dense"})
    classifier = "head.classification_head.cls_logits.weight"
    options: RetinaNetOptions

    def __init__(self, options: RetinaNetOptions | None = None, *, num_classes: int) -> None:
        options = options or RetinaNetOptions()
        _check(options, num_classes)
        strides = options.levels.strides
        sizes, ratios = anchor_shapes(options.anchor_generator, len(strides))
        # Before the backbone: the order decides the random weights that a seed gives.
        head = RetinaNetHead(
            options.fpn.out_channels,
            len(sizes[0]) * len(ratios[0]),
            num_classes,
            norm=options.retinanet.norm,
            prior_prob=options.retinanet.prior_prob,
        )
        super().__init__(make_dense_backbone(options), options, num_classes=num_classes)
        self.head = head
        self.anchor_generator = StridedAnchors(sizes, ratios, strides)
        background, foreground = options.retinanet.iou_thresholds
        # Every box has its best anchors, however low their IoU.
        self.matcher = Matcher(foreground, background, allow_low_quality_matches=True)
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    @property
    def name(self) -> str:
        return "torchvision's RetinaNet"

    def parts(self, images: Sequence[torch.Tensor]) -> RetinaNetParts:
        return RetinaNetParts(self, images)

    def export(self, path: Path, *, min_size: int, max_size: int, about: Mapping[str, Any]) -> str:
        """Write one state dict, which plain torchvision loads."""
        self.write_state(path, min_size=min_size, max_size=max_size, about=about)
        return retinanet_loading_code(
            self.options, self.num_classes, str(path), min_size=min_size, max_size=max_size
        )

    @torch.no_grad()
    def assign(self, anchors: torch.Tensor, targets: Targets) -> Assignment:
        """What each of N anchors (N, 4) is to predict; labels are -1 where it is to learn nothing.

        Source: RetinaNet (Lin et al., arXiv 1708.02002, section 4), and detectron2 for boxes that
        no anchor fits well.
        """
        # A label that a teacher found beyond the edge has no area once it is clipped. No anchor
        # overlaps it, so all would be its best ones and learn an object.
        usable = has_area(targets.boxes)
        targets = Targets(targets.boxes[usable], targets.labels[usable])
        if not len(targets):
            background = targets.labels.new_full((len(anchors),), self.num_classes)
            return Assignment(background, torch.zeros_like(anchors))
        matches = self.matcher(box_iou(targets.boxes, anchors))
        box = matches.clamp(min=0)
        labels = torch.where(matches >= 0, targets.labels[box], self.num_classes)
        labels[matches == Matcher.BETWEEN_THRESHOLDS] = -1
        return Assignment(labels, targets.boxes[box])


class RetinaNetParts(DenseParts):
    """The detector at work on some images."""

    at_most_locations = False
    _options: RetinaNetHeadOptions

    def __init__(self, detector: TorchvisionRetinaNet, images: Sequence[torch.Tensor]) -> None:
        super().__init__(detector, images, detector.options.retinanet)
        self._detector = detector

    @cached_property
    def _anchors(self) -> torch.Tensor:
        """(N, 4), of any image of the batch."""
        return self._detector.anchor_generator(self._batch, self._features)[0]

    @cached_property
    def _outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._detector.head(self._features)

    @cached_property
    def _maps(self) -> DenseMaps:
        logits, deltas = self._outputs
        anchors = self._anchors.expand(len(deltas), -1, -1).flatten(0, 1)
        boxes = self._detector.box_coder.decode_single(deltas.flatten(0, 1), anchors)
        per_place = self._detector.anchor_generator.num_anchors_per_location()
        sizes = [level.shape[-2] * level.shape[-1] for level in self._features]
        levels = tuple(count * size for count, size in zip(per_place, sizes, strict=True))
        return DenseMaps(logits, boxes.view_as(deltas), None, levels)

    def losses(self, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
        self.check_count("targets", targets)
        assigned = [self._detector.assign(self._anchors, target) for target in targets]
        labels = torch.stack([item.labels for item in assigned])
        boxes = torch.stack([item.boxes for item in assigned])
        positive = (labels >= 0) & (labels < self._detector.num_classes)
        divisor = self._divisor(positive)
        logits, deltas = self._outputs
        focal = sigmoid_focal_loss(
            logits,
            one_hot_targets(logits, labels),
            alpha=self._options.focal_loss_alpha,
            gamma=self._options.focal_loss_gamma,
        )
        anchors = self._anchors.expand_as(deltas)[positive]
        distance = F.smooth_l1_loss(
            deltas[positive],
            self._detector.box_coder.encode_single(boxes[positive], anchors),
            beta=self._options.smooth_l1_loss_beta,
            reduction="sum",
        )
        return {
            "loss_cls": (focal * (labels >= 0)[..., None]).sum() / divisor,
            "loss_box_reg": distance / divisor,
        }


def _check(options: RetinaNetOptions, num_classes: int) -> None:
    """Raise ValueError where single values are allowed but not together."""
    check_options(options, num_classes)
    check_gamma(options.retinanet.focal_loss_gamma)
    thresholds = options.retinanet.iou_thresholds
    check_lengths({"retinanet iou_thresholds": (thresholds, 2)})
    if thresholds != sorted(thresholds):
        raise ValueError(f"iou_thresholds = {thresholds} is not allowed (must be ascending)")
    if options.retinanet.norm == "GN":
        check_groups(options.fpn.out_channels)
