"""From a configuration to its detector."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import read_options
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.faster_rcnn import build_faster_rcnn
from ssod_imwa.detection.detectors.options import (
    AnchorOptions,
    BackboneOptions,
    DetectionOptions,
    FasterRCNNOptions,
    FocalOptions,
    FPNOptions,
    ImageOptions,
    PixelOptions,
    ResNetOptions,
    ROIBoxHeadOptions,
    ROIHeadsOptions,
    ROILossOptions,
    RPNOptions,
)
from ssod_imwa.errors import as_config_error


def build_detector(cfg: CfgNode, num_classes: int) -> Detector:
    """The detector of MODEL with its initial weights, on the CPU."""
    if cfg.MODEL.TOOLKIT == "detectron2":
        # Here and not at the top: detectron2 is optional.
        from ssod_imwa.detection.detectors.detectron2 import build_detectron2_detector

        name = cfg.MODEL.DETECTRON2.CONFIG
        detector: Detector = build_detectron2_detector(
            cfg,
            num_classes=num_classes,
            lazy_config=name if name.endswith(".py") else "",
            loss=cfg.MODEL.ROI_HEADS.LOSS,
            focal_gamma=_focal_options(cfg).focal_gamma,
        )
    else:
        with as_config_error("MODEL"):
            detector = build_faster_rcnn(faster_rcnn_options(cfg), num_classes=num_classes)
    detector.load_weights(cfg.MODEL.WEIGHTS)
    return detector


def faster_rcnn_options(cfg: CfgNode) -> FasterRCNNOptions:
    """The settings of torchvision's Faster R-CNN in a configuration."""
    model = cfg.MODEL
    return FasterRCNNOptions(
        pixels=read_options(PixelOptions, model),
        image=read_options(ImageOptions, cfg.INPUT),
        backbone=read_options(BackboneOptions, model.BACKBONE),
        resnets=read_options(ResNetOptions, model.RESNETS),
        fpn=read_options(FPNOptions, model.FPN),
        anchor_generator=read_options(AnchorOptions, model.ANCHOR_GENERATOR),
        rpn=read_options(RPNOptions, model.RPN),
        roi_heads=read_options(ROIHeadsOptions, model.ROI_HEADS),
        roi_loss=read_options(ROILossOptions, model.ROI_HEADS),
        focal=_focal_options(cfg),
        roi_box_head=read_options(ROIBoxHeadOptions, model.ROI_BOX_HEAD),
        detections=read_options(DetectionOptions, cfg.TEST),
    )


def _focal_options(cfg: CfgNode) -> FocalOptions:
    roi_heads = cfg.MODEL.ROI_HEADS
    return (
        read_options(FocalOptions, roi_heads) if roi_heads.LOSS == "FocalLoss" else FocalOptions()
    )
