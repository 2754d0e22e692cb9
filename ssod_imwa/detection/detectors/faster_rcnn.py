"""Faster R-CNN with a ResNet-FPN, made of torchvision's parts.

The parameter names are those of `torchvision.models.detection.FasterRCNN`, so that weights move
between the two (`export.py`). What differs from torchvision's own model is what Unbiased Teacher
takes from detectron2: box losses (L1, detectron2's divisors), the choice of the ROI head's
classification loss, and the heads' initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.detection.detectors.base import (
    Detector,
    groups_of_equal_size,
    padded_size,
)
from ssod_imwa.detection.detectors.faster_rcnn_parts import (
    BoxHeads,
    ProposalHead,
    ProposalNetwork,
    make_anchors,
    make_backbone,
    make_box_head,
    make_box_predictor,
)
from ssod_imwa.detection.losses import check_gamma
from ssod_imwa.engine.modes import evaluating

DEPTHS = (18, 50, 101)
NORMS = ("FrozenBN", "BN")
FORMATS = ("RGB", "BGR")
LOSSES = ("CrossEntropy", "FocalLoss")
# The pyramid's coarsest convolutional level, p5, has this stride; images are padded to multiples.
SIZE_DIVISOR = 32


class TorchvisionFasterRCNN(Detector):
    """Faster R-CNN; `build_faster_rcnn` makes one.

    Args:
        backbone: torchvision's ResNet with a feature pyramid.
        rpn: proposes boxes; in training mode its losses are named as torchvision's.
        roi_heads: classifies them; labels 1..C, 0 is background.
        num_classes: C.
        pixel_mean: subtracted from pixels in 0..255, one number per channel of `image_format`.
        pixel_std: divided into the difference.
        image_format: order of the channels that the backbone sees, "RGB" or "BGR".
        depth: of the ResNet.
        stride_in_1x1: whether bottlenecks stride as Caffe's do.
    """

    def __init__(
        self,
        backbone: BackboneWithFPN,
        rpn: ProposalNetwork,
        roi_heads: BoxHeads,
        *,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_format: str,
        depth: int,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__(num_classes)
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.image_format = image_format
        self.depth = depth
        self.stride_in_1x1 = stride_in_1x1
        # Not persistent: torchvision's state dict has no such keys.
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> dict[str, torch.Tensor]:
        self.check_losses(images, targets)
        batch = self._batch(images)
        # torchvision counts its classes from 1; 0 is background.
        shifted = [{"boxes": t.boxes, "labels": t.labels + 1} for t in targets]
        features = self.backbone(batch.tensors)
        proposals, rpn_losses = self.rpn(batch, features, shifted)
        _, roi_losses = self.roi_heads(features, proposals, batch.image_sizes, shifted)
        return {
            "loss_rpn_cls": rpn_losses["loss_objectness"],
            "loss_rpn_loc": rpn_losses["loss_rpn_box_reg"],
            "loss_cls": roi_losses["loss_classifier"],
            "loss_box_reg": roi_losses["loss_box_reg"],
        }

    @torch.no_grad()
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        found: dict[int, Detections] = {}
        with evaluating(self):
            for indices in groups_of_equal_size(images, SIZE_DIVISOR):
                results = self._detect_batch([images[i] for i in indices])
                found.update(zip(indices, results, strict=True))
        return [found[index] for index in range(len(images))]

    def _detect_batch(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        batch = self._batch(images)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        results, _ = self.roi_heads(features, proposals, batch.image_sizes)
        return [Detections(r["boxes"], r["labels"] - 1, r["scores"]) for r in results]

    def _batch(self, images: Sequence[torch.Tensor]) -> ImageList:
        """Normalize and pad with zeros, the mean color, at the right and at the bottom."""
        batch = self.pixel_mean.new_zeros(len(images), 3, *padded_size(images, SIZE_DIVISOR))
        for row, image in zip(batch, images, strict=True):
            pixels = image if self.image_format == "RGB" else image.flip(0)
            height, width = image.shape[-2:]
            row[:, :height, :width] = (pixels - self.pixel_mean) / self.pixel_std
        return ImageList(batch, [tuple(image.shape[-2:]) for image in images])


def build_faster_rcnn(
    *,
    num_classes: int,
    depth: int = 50,
    norm: str = "FrozenBN",
    freeze_at: int = 2,
    stride_in_1x1: bool = False,
    fpn_channels: int = 256,
    anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
    anchor_aspect_ratios: Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
    rpn_iou_thresholds: Sequence[float] = (0.3, 0.7),
    rpn_batch_size_per_image: int = 256,
    rpn_positive_fraction: float = 0.5,
    rpn_pre_nms_topk_train: int = 2000,
    rpn_pre_nms_topk_test: int = 1000,
    rpn_post_nms_topk_train: int = 1000,
    rpn_post_nms_topk_test: int = 1000,
    rpn_nms_thresh: float = 0.7,
    roi_batch_size_per_image: int = 512,
    roi_positive_fraction: float = 0.25,
    roi_iou_threshold: float = 0.5,
    roi_score_thresh_test: float = 0.05,
    roi_nms_thresh_test: float = 0.5,
    loss: str = "CrossEntropy",
    focal_gamma: float = 1.5,
    pooler_resolution: int = 7,
    fc_dim: int = 1024,
    smooth_l1_beta: float = 0.0,
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    image_format: str = "RGB",
    detections_per_image: int = 100,
) -> TorchvisionFasterRCNN:
    """A Faster R-CNN with random weights; `pretrained.load_weights` fills them.

    The arguments are the configuration's MODEL keys and mean what docs/keys.md says.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> detector = build_faster_rcnn(num_classes=10, depth=18, norm="BN", fpn_channels=64)
        >>> found = detector.detect([torch.zeros(3, 64, 96, dtype=torch.uint8)])
        >>> len(found)
        1
    """
    _check_choice("depth", depth, DEPTHS)
    _check_choice("norm", norm, NORMS)
    _check_choice("freeze_at", freeze_at, range(6))
    _check_choice("image_format", image_format, FORMATS)
    _check_choice("loss", loss, LOSSES)
    if loss == "FocalLoss":
        check_gamma(focal_gamma)
    if len(pixel_mean) != 3 or len(pixel_std) != 3 or min(pixel_std) <= 0:
        raise ValueError(
            f"pixel_mean = {list(pixel_mean)}, pixel_std = {list(pixel_std)} are not allowed "
            "(must be three numbers each, the latter positive)"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes = {num_classes} is not allowed (must be at least 1)")
    anchors = make_anchors(anchor_sizes, anchor_aspect_ratios)
    rpn = ProposalNetwork(
        anchors,
        ProposalHead(fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=rpn_iou_thresholds[1],
        bg_iou_thresh=rpn_iou_thresholds[0],
        batch_size_per_image=rpn_batch_size_per_image,
        positive_fraction=rpn_positive_fraction,
        pre_nms_top_n={"training": rpn_pre_nms_topk_train, "testing": rpn_pre_nms_topk_test},
        post_nms_top_n={"training": rpn_post_nms_topk_train, "testing": rpn_post_nms_topk_test},
        nms_thresh=rpn_nms_thresh,
    )
    rpn.smooth_l1_beta = smooth_l1_beta
    rpn.batch_size_per_image = rpn_batch_size_per_image
    roi_heads = BoxHeads(
        MultiScaleRoIAlign(["0", "1", "2", "3"], pooler_resolution, sampling_ratio=2),
        make_box_head(fpn_channels * pooler_resolution**2, fc_dim),
        make_box_predictor(fc_dim, num_classes),
        fg_iou_thresh=roi_iou_threshold,
        bg_iou_thresh=roi_iou_threshold,
        batch_size_per_image=roi_batch_size_per_image,
        positive_fraction=roi_positive_fraction,
        bbox_reg_weights=None,
        score_thresh=roi_score_thresh_test,
        nms_thresh=roi_nms_thresh_test,
        detections_per_img=detections_per_image,
    )
    roi_heads.loss = loss
    roi_heads.focal_gamma = focal_gamma
    roi_heads.smooth_l1_beta = smooth_l1_beta
    return TorchvisionFasterRCNN(
        make_backbone(
            depth=depth,
            norm=norm,
            freeze_at=freeze_at,
            stride_in_1x1=stride_in_1x1,
            fpn_channels=fpn_channels,
        ),
        rpn,
        roi_heads,
        num_classes=num_classes,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        image_format=image_format,
        depth=depth,
        stride_in_1x1=stride_in_1x1,
    )


def _check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not allowed (must be one of {list(allowed)})")
