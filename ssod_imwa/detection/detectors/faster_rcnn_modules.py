"""The modules of torchvision's Faster R-CNN that differ here, and how they are initialized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from ssod_imwa.detection.detectors.anchors import LevelAnchors, anchor_shapes
from ssod_imwa.detection.detectors.options import FasterRCNNOptions
from ssod_imwa.detection.detectors.region_pool import RegionPool
from ssod_imwa.detection.losses import box_loss, multiclass_focal_loss


class ProposalHead(RPNHead):
    """Its outputs are float32 under autocast, too: boxes are decoded from them."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class BoxPredictor(FastRCNNPredictor):
    """Its outputs are float32 under autocast, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, with detectron2's losses: sums divided by batch size per image * images."""

    smooth_l1_beta: float
    batch_size_per_image: int

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positive, negative = (torch.cat(masks) > 0 for masks in self.fg_bg_sampler(labels))
        sampled = torch.where(positive | negative)[0]
        positive = torch.where(positive)[0]
        divisor = self.batch_size_per_image * len(labels)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        location_loss = box_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            divisor=divisor,
            beta=self.smooth_l1_beta,
        )
        return objectness_loss / divisor, location_loss


class BoxHeads(RoIHeads):
    """torchvision's, with the focal loss (gamma 0: cross-entropy) and detectron2's box loss."""

    gamma: float
    smooth_l1_beta: float

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, _, labels, box_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return [], self.compute_loss(logits, deltas, torch.cat(labels), torch.cat(box_targets))

    def compute_loss(
        self,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        labels: torch.Tensor,
        box_targets: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Losses of R sampled proposals: logits (R, C+1), deltas (R, 4(C+1)), labels (R,)."""
        positive = torch.where(labels > 0)[0]
        of_class = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
        location_loss = box_loss(
            of_class, box_targets[positive], divisor=len(labels), beta=self.smooth_l1_beta
        )
        return {
            "loss_classifier": multiclass_focal_loss(logits, labels, gamma=self.gamma),
            "loss_box_reg": location_loss,
        }


def make_proposal_network(options: FasterRCNNOptions) -> ProposalNetwork:
    """The network that proposes boxes, with random weights."""
    rpn = options.rpn
    anchors = LevelAnchors(*anchor_shapes(options.anchor_generator, len(options.levels.levels) + 1))
    background, foreground = rpn.iou_thresholds
    network = ProposalNetwork(
        anchors,
        ProposalHead(options.fpn.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=foreground,
        bg_iou_thresh=background,
        batch_size_per_image=rpn.batch_size_per_image,
        positive_fraction=rpn.positive_fraction,
        pre_nms_top_n={"training": rpn.pre_nms_topk_train, "testing": rpn.pre_nms_topk_test},
        post_nms_top_n={"training": rpn.post_nms_topk_train, "testing": rpn.post_nms_topk_test},
        nms_thresh=rpn.nms_thresh,
    )
    network.smooth_l1_beta = options.roi_box_head.smooth_l1_beta
    network.batch_size_per_image = rpn.batch_size_per_image
    return network


def make_box_heads(options: FasterRCNNOptions, num_classes: int) -> BoxHeads:
    """The heads that classify and refine proposals, with random weights."""
    roi, head = options.roi_heads, options.roi_box_head
    (iou_threshold,) = roi.iou_thresholds
    heads = BoxHeads(
        RegionPool(options.levels.levels, head.pooler_resolution, sampling_ratio=2),
        make_box_head(options.fpn.out_channels * head.pooler_resolution**2, head.fc_dim),
        make_box_predictor(head.fc_dim, num_classes),
        fg_iou_thresh=iou_threshold,
        bg_iou_thresh=iou_threshold,
        batch_size_per_image=roi.batch_size_per_image,
        positive_fraction=roi.positive_fraction,
        bbox_reg_weights=None,
        score_thresh=roi.score_thresh_test,
        nms_thresh=roi.nms_thresh_test,
        detections_per_img=options.detections.detections_per_image,
    )
    heads.gamma = options.focal.focal_gamma if options.roi_loss.loss == "FocalLoss" else 0.0
    heads.smooth_l1_beta = head.smooth_l1_beta
    return heads


def make_box_head(in_channels: int, fc_dim: int) -> TwoMLPHead:
    """Two fully connected layers with detectron2's initial weights."""
    head = TwoMLPHead(in_channels, fc_dim)
    for layer in (head.fc6, head.fc7):
        nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.zeros_(layer.bias)
    return head


def make_box_predictor(in_channels: int, num_classes: int) -> FastRCNNPredictor:
    """detectron2's initial weights: so small that the first guess is nearly uniform."""
    predictor = BoxPredictor(in_channels, num_classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return predictor
