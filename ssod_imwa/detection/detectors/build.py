"""From a configuration to its detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import read_options
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.detectors.fcos import TorchvisionFCOS
from ssod_imwa.detection.detectors.options import (
    TIMM,
    AnchorOptions,
    BackboneOptions,
    DenseLevelOptions,
    DetectionOptions,
    DetectorOptions,
    FasterRCNNOptions,
    FCOSHeadOptions,
    FCOSOptions,
    FocalOptions,
    FPNOptions,
    ImageOptions,
    LevelOptions,
    PixelOptions,
    ResNetOptions,
    RetinaNetHeadOptions,
    RetinaNetOptions,
    ROIBoxHeadOptions,
    ROIHeadsOptions,
    ROILossOptions,
    RPNOptions,
)
from ssod_imwa.detection.detectors.retinanet import TorchvisionRetinaNet
from ssod_imwa.engine.checkpoint.packages import PREFIX
from ssod_imwa.errors import ConfigError, as_config_error


def build_detector(cfg: CfgNode, num_classes: int) -> Detector:
    """The detector of MODEL with its initial weights, on the CPU."""
    if cfg.MODEL.TOOLKIT == "detectron2":
        _check_toolkits_own(cfg)
        # Here and not at the top: detectron2 is optional.
        from ssod_imwa.detection.detectors.detectron2 import build_detectron2_detector

        name = cfg.MODEL.DETECTRON2.CONFIG
        detector: Detector = build_detectron2_detector(
            cfg,
            num_classes=num_classes,
            lazy_config=name if name.endswith(".py") else "",
            loss=cfg.MODEL.ROI_HEADS.LOSS,
            focal_gamma=read_options(FocalOptions, cfg.MODEL.ROI_HEADS).focal_gamma,
        )
    else:
        with as_config_error("MODEL"):
            detector_class, options_of = _ARCHITECTURES[cfg.MODEL.META_ARCHITECTURE]
            detector = detector_class(options_of(cfg), num_classes=num_classes)
    detector.load_weights(cfg.MODEL.WEIGHTS)
    return detector


def _check_toolkits_own(cfg: CfgNode) -> None:
    """Refuse by name what only torchvision's detectors can take."""
    for key, value, prefix in (
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, TIMM),
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, PREFIX),
    ):
        if str(value).startswith(prefix):
            raise ConfigError(
                f"{key} = {value!r} is not allowed with MODEL.TOOLKIT = 'detectron2' (must be one "
                "of detectron2's own; torchvision's detectors take it)"
            )


def faster_rcnn_options(cfg: CfgNode) -> FasterRCNNOptions:
    """The settings of torchvision's Faster R-CNN in a configuration."""
    model = cfg.MODEL
    return FasterRCNNOptions(
        **_common_options(cfg),
        levels=read_options(LevelOptions, model.FPN),
        anchor_generator=read_options(AnchorOptions, model.ANCHOR_GENERATOR),
        rpn=read_options(RPNOptions, model.RPN),
        roi_heads=read_options(ROIHeadsOptions, model.ROI_HEADS),
        roi_loss=read_options(ROILossOptions, model.ROI_HEADS),
        focal=read_options(FocalOptions, model.ROI_HEADS),
        roi_box_head=read_options(ROIBoxHeadOptions, model.ROI_BOX_HEAD),
    )


def fcos_options(cfg: CfgNode) -> FCOSOptions:
    """The settings of torchvision's FCOS in a configuration."""
    return FCOSOptions(
        **_common_options(cfg),
        levels=read_options(DenseLevelOptions, cfg.MODEL.FPN),
        fcos=read_options(FCOSHeadOptions, cfg.MODEL.FCOS),
    )


def retinanet_options(cfg: CfgNode) -> RetinaNetOptions:
    """The settings of torchvision's RetinaNet in a configuration."""
    return RetinaNetOptions(
        **_common_options(cfg),
        levels=read_options(DenseLevelOptions, cfg.MODEL.FPN),
        anchor_generator=read_options(AnchorOptions, cfg.MODEL.ANCHOR_GENERATOR),
        retinanet=read_options(RetinaNetHeadOptions, cfg.MODEL.RETINANET),
    )


# Values of MODEL.META_ARCHITECTURE of torchvision's detectors, and what reads their options.
_ARCHITECTURES: dict[str, tuple[Callable[..., Detector], Callable[[CfgNode], DetectorOptions]]] = {
    "GeneralizedRCNN": (TorchvisionFasterRCNN, faster_rcnn_options),
    "FCOS": (TorchvisionFCOS, fcos_options),
    "RetinaNet": (TorchvisionRetinaNet, retinanet_options),
}


def _common_options(cfg: CfgNode) -> dict[str, Any]:
    """The groups of `DetectorOptions`."""
    model = cfg.MODEL
    return {
        "pixels": read_options(PixelOptions, model),
        "image": read_options(ImageOptions, cfg.INPUT),
        "backbone": read_options(BackboneOptions, model.BACKBONE),
        "resnets": read_options(ResNetOptions, model.get("RESNETS")),
        "fpn": read_options(FPNOptions, model.FPN),
        "detections": read_options(DetectionOptions, cfg.TEST),
    }
