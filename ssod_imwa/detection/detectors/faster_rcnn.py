"""Faster R-CNN with a ResNet-FPN, made of torchvision's parts.

The parameter names are those of `torchvision.models.detection.FasterRCNN`, so that weights move
between the two (`export.py`). What differs from torchvision's own model is what Unbiased Teacher
takes from detectron2: box losses (L1, detectron2's divisors), the choice of the ROI head's
classification loss, and the heads' initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import clip_boxes_to_image

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.detection.detectors.backbones import build_backbone
from ssod_imwa.detection.detectors.export import loading_code
from ssod_imwa.detection.detectors.faster_rcnn_modules import (
    make_box_heads,
    make_proposal_network,
)
from ssod_imwa.detection.detectors.options import FasterRCNNOptions
from ssod_imwa.detection.detectors.parts import (
    Parts,
    RegionOutputs,
    Regions,
    SampledBoxes,
    borrowed,
)
from ssod_imwa.detection.detectors.torchvision_detector import (
    TorchvisionDetector,
    check_lengths,
    check_options,
)
from ssod_imwa.detection.losses import box_loss, check_gamma


class TorchvisionFasterRCNN(TorchvisionDetector):
    """Faster R-CNN with random weights; `load_weights` fills them.

    Args:
        options: None takes all defaults: a ResNet-50 whose batch norms are frozen, for images of
            COCO's size.
        num_classes: C, without background.

    Attributes:
        rpn: proposes boxes; in training mode its losses are named as torchvision's.
        roi_heads: classifies them; labels 1..C, 0 is background.

    Raises:
        ValueError: values are out of range or do not fit together.

    Example:
        >>> from ssod_imwa.detection.detectors.options import BackboneOptions, ResNetOptions
        >>> options = FasterRCNNOptions(
        ...     backbone=BackboneOptions(freeze_at=0), resnets=ResNetOptions(depth=18, norm="BN")
        ... )
        >>> detector = TorchvisionFasterRCNN(options, num_classes=10)
        >>> detections = detector.detect([torch.zeros(3, 64, 96, dtype=torch.uint8)])
        >>> len(detections)
        1
    """

    abilities = frozenset({"regions"})
    classifier = "roi_heads.box_predictor.cls_score.weight"
    background_rows = 1
    options: FasterRCNNOptions

    def __init__(self, options: FasterRCNNOptions | None = None, *, num_classes: int) -> None:
        options = options or FasterRCNNOptions()
        _check(options, num_classes)
        # In this order, which decides the random weights that a seed gives.
        rpn = make_proposal_network(options)
        roi_heads = make_box_heads(options, num_classes)
        backbone = build_backbone(
            options.backbone, options.resnets, options.fpn, levels=options.levels.levels
        )
        super().__init__(backbone, options, num_classes=num_classes)
        self.rpn = rpn
        self.roi_heads = roi_heads

    @property
    def name(self) -> str:
        return "torchvision's Faster R-CNN"

    def parts(self, images: Sequence[torch.Tensor]) -> FasterRCNNParts:
        return FasterRCNNParts(self, images)

    def export(self, path: Path, *, min_size: int, max_size: int, about: Mapping[str, Any]) -> str:
        """Write one state dict, which plain torchvision loads."""
        self.write_state(path, min_size=min_size, max_size=max_size, about=about)
        return loading_code(
            self.options, self.num_classes, str(path), min_size=min_size, max_size=max_size
        )


class FasterRCNNParts(Parts, Regions):
    """The detector at work on some images; their second stage, too."""

    def __init__(self, detector: TorchvisionFasterRCNN, images: Sequence[torch.Tensor]) -> None:
        super().__init__(detector.name, images)
        self._backbone, self._rpn = detector.backbone, detector.rpn
        self._roi_heads = detector.roi_heads
        self._num_classes = detector.num_classes
        self._batch = detector.batch(images)

    @property
    def regions(self) -> Regions:
        return self

    @cached_property
    def _features(self) -> dict[str, torch.Tensor]:
        return self._backbone(self._batch.tensors)

    def losses(self, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
        proposals, losses = self.propose(targets)
        _, roi_losses = self._roi_heads(
            self._features, proposals, self._batch.image_sizes, _counted_from_1(targets)
        )
        return {
            **losses,
            "loss_cls": roi_losses["loss_classifier"],
            "loss_box_reg": roi_losses["loss_box_reg"],
        }

    def detections(self) -> list[Detections]:
        limits = [self._rpn._pre_nms_top_n, self._rpn._post_nms_top_n]
        phase = "training" if self.training_proposals else "testing"
        with borrowed(limits, from_=phase, to="testing"):
            proposals, _ = self._rpn(self._batch, self._features)
        results, _ = self._roi_heads(self._features, proposals, self._batch.image_sizes)
        return [Detections(r["boxes"], r["labels"] - 1, r["scores"]) for r in results]

    def propose(
        self, targets: Sequence[Targets]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        self.check_count("targets", targets)
        proposals, losses = self._rpn(self._batch, self._features, _counted_from_1(targets))
        return proposals, {
            "loss_rpn_cls": losses["loss_objectness"],
            "loss_rpn_loc": losses["loss_rpn_box_reg"],
        }

    @torch.no_grad()
    def sample(
        self, proposals: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> list[SampledBoxes]:
        self.check_count("targets", targets)
        self.check_count("lists of proposals", proposals)
        boxes, matches, labels, _ = self._roi_heads.select_training_samples(
            list(proposals), _counted_from_1(targets)
        )
        return [
            SampledBoxes(
                image_boxes,
                torch.where(image_labels > 0, image_labels - 1, self._num_classes),
                target.boxes[match] if len(target) else torch.zeros_like(image_boxes),
            )
            for image_boxes, match, image_labels, target in zip(
                boxes, matches, labels, targets, strict=True
            )
        ]

    def predict(self, boxes: Sequence[torch.Tensor]) -> RegionOutputs:
        self.check_count("lists of boxes", boxes)
        heads = self._roi_heads
        pooled = heads.box_roi_pool(self._features, list(boxes), self._batch.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return RegionOutputs(
            list(boxes),
            torch.cat([logits[:, 1:], logits[:, :1]], dim=1),
            deltas.view(-1, self._num_classes + 1, 4)[:, 1:],
        )

    def refine(self, outputs: RegionOutputs) -> list[torch.Tensor]:
        refined = self._roi_heads.box_coder.decode_single(
            outputs.deltas.flatten(1), torch.cat(outputs.boxes)
        )
        of_images = refined.view_as(outputs.deltas).split([len(boxes) for boxes in outputs.boxes])
        return [
            clip_boxes_to_image(boxes, size)
            for boxes, size in zip(of_images, self._batch.image_sizes, strict=True)
        ]

    def box_loss(self, outputs: RegionOutputs, sampled: Sequence[SampledBoxes]) -> torch.Tensor:
        labels = torch.cat([item.labels for item in sampled])
        positive = torch.where(labels < self._num_classes)[0]
        boxes = torch.cat([item.boxes for item in sampled])[positive]
        matched = torch.cat([item.matched for item in sampled])[positive]
        return box_loss(
            outputs.deltas[positive, labels[positive]],
            self._roi_heads.box_coder.encode_single(matched, boxes),
            divisor=len(labels),
            beta=self._roi_heads.smooth_l1_beta,
        )


def _counted_from_1(targets: Sequence[Targets]) -> list[dict[str, torch.Tensor]]:
    """Targets as torchvision takes them: 0 is background."""
    return [{"boxes": target.boxes, "labels": target.labels + 1} for target in targets]


def _check(options: FasterRCNNOptions, num_classes: int) -> None:
    """Raise ValueError where single values are allowed but not together."""
    if options.roi_loss.loss == "FocalLoss":
        check_gamma(options.focal.focal_gamma)
    check_options(options, num_classes)
    check_lengths(
        {
            "rpn iou_thresholds": (options.rpn.iou_thresholds, 2),
            "roi_heads iou_thresholds": (options.roi_heads.iou_thresholds, 1),
        }
    )
