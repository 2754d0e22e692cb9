"""The settings of detectors made of torchvision's parts, a class for each group of MODEL's keys.

Names, and defaults where a paper does not ask for others, are detectron2's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssod_imwa.config.options import Options, Switch, beginning_with, option, other_than
from ssod_imwa.engine.checkpoint.packages import PIXEL_MEAN, PIXEL_STD


@dataclass(frozen=True)
class PixelOptions(Options):
    """MODEL: what is done to pixels before the first layer."""

    pixel_mean: list[float] = option(
        [123.675, 116.28, 103.53], "subtracted from pixels (0..255), in the order of INPUT.FORMAT"
    )
    pixel_std: list[float] = option(
        [58.395, 57.12, 57.375], "divided into pixels, in the order of INPUT.FORMAT", above=0
    )


@dataclass(frozen=True)
class LitePixelOptions(PixelOptions):
    """MODEL: the same for EfficientNet-Lite, whose weights know other pixels."""

    pixel_mean: list[float] = option(PIXEL_MEAN, "subtracted from pixels (0..255)")
    pixel_std: list[float] = option(PIXEL_STD, "divided into pixels (0..255)", above=0)


@dataclass(frozen=True)
class ImageOptions(Options):
    """INPUT: what the first layer expects."""

    format: Literal["RGB", "BGR"] = option(
        "RGB", 'channel order the detector sees; images are read as RGB, "BGR" is for Caffe weights'
    )


TIMM = "timm:"
IS_TIMM = beginning_with(TIMM)
IS_LITE = beginning_with(f"{TIMM}tf_efficientnet_lite")
IS_NOT_LITE = other_than(IS_LITE)
IS_RESNET = Switch("= 'resnet'", lambda value: value == "resnet")


@dataclass(frozen=True)
class BackboneOptions(Options):
    """MODEL.BACKBONE."""

    name: str = option(
        "resnet",
        'the network below the pyramid: "resnet", torchvision\'s with MODEL.RESNETS.DEPTH layers, '
        'or "timm:NAME", any of timm\'s that gives maps (docs/backbones.md)',
    )
    freeze_at: int = option(
        2,
        "stages that stay fixed: 0 none, 1 the stem, 2 the stem and the first stage, ... (5 is all "
        "of a ResNet)",
        low=0,
    )
    lr_factor: float = option(
        1.0, "factor of SOLVER.BASE_LR for the network below the pyramid", low=0
    )
    norm: Literal["FrozenBN", "BN"] = option(
        "FrozenBN",
        '"FrozenBN" keeps the statistics of the initial weights, "BN" trains them',
        when={"name": IS_TIMM},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "resnet" and self.name not in IS_TIMM:
            raise ValueError(
                f"name = {self.name!r} is not allowed (must be 'resnet' or 'timm:NAME')"
            )


@dataclass(frozen=True)
class ResNetOptions(Options):
    """MODEL.RESNETS."""

    depth: Literal[18, 50, 101] = option(50, "layers of the ResNet")
    norm: Literal["FrozenBN", "BN"] = option(
        "FrozenBN", '"FrozenBN" keeps the statistics of the initial weights, "BN" trains them'
    )
    stride_in_1x1: bool = option(
        False, "put a bottleneck's stride in its first 1x1 convolution, as Caffe's ResNets do"
    )


@dataclass(frozen=True)
class FPNOptions(Options):
    """MODEL.FPN."""

    out_channels: int = option(256, "channels of each level of the feature pyramid", low=1)


@dataclass(frozen=True)
class LevelOptions(Options):
    """MODEL.FPN, of two-stage detectors."""

    levels: list[int] = option(
        [2, 3, 4, 5],
        "which of the backbone's maps the pyramid stands on: 2 has a quarter of the image's edges, "
        "3 an eighth, ...; a level is added behind the last",
        low=1,
        high=6,
    )


@dataclass(frozen=True)
class DenseLevelOptions(Options):
    """MODEL.FPN, of dense detectors."""

    levels: list[int] = option(
        [3, 4, 5],
        "which of the backbone's maps the pyramid stands on: 2 has a quarter of the image's edges, "
        "3 an eighth, ...; two levels are added behind the last",
        low=1,
        high=6,
    )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between the locations of each level, of the two that are added, too."""
        last = max(self.levels)
        return tuple(2**level for level in (*self.levels, last + 1, last + 2))


@dataclass(frozen=True)
class AnchorOptions(Options):
    """MODEL.ANCHOR_GENERATOR."""

    sizes: list[list[float]] = option(
        [[32], [64], [128], [256], [512]],
        "edge lengths in pixels, a list for each level: MODEL.FPN.LEVELS and one more of Faster "
        "R-CNN, two more of RetinaNet",
        above=0,
    )
    aspect_ratios: list[list[float]] = option(
        [[0.5, 1.0, 2.0]], "height over width, a list for each level or one for all", above=0
    )


@dataclass(frozen=True)
class RPNOptions(Options):
    """MODEL.RPN: the network that proposes boxes."""

    iou_thresholds: list[float] = option(
        [0.3, 0.7],
        "an anchor is background below the first, an object from the second IoU on",
        low=0,
        high=1,
    )
    batch_size_per_image: int = option(256, "anchors sampled from each image for the losses")
    positive_fraction: float = option(0.5, "share of objects among sampled anchors, at most")
    pre_nms_topk_train: int = option(2000, "best proposals of a level before NMS, in training")
    pre_nms_topk_test: int = option(1000, "best proposals of a level before NMS, in detection")
    post_nms_topk_train: int = option(1000, "proposals of an image after NMS, in training")
    post_nms_topk_test: int = option(1000, "proposals of an image after NMS, in detection")
    nms_thresh: float = option(0.7, "a proposal is dropped above this IoU with a better one")


@dataclass(frozen=True)
class ROIHeadsOptions(Options):
    """MODEL.ROI_HEADS: what is trained on and found among proposals."""

    batch_size_per_image: int = option(512, "proposals sampled from each image for the losses")
    positive_fraction: float = option(0.25, "share of objects among sampled proposals, at most")
    iou_thresholds: list[float] = option(
        [0.5], "a proposal is an object from this IoU with one on", low=0, high=1
    )
    score_thresh_test: float = option(0.05, "detections with a lower score are dropped")
    nms_thresh_test: float = option(0.5, "a detection is dropped above this IoU with a better one")


@dataclass(frozen=True)
class ROILossOptions(Options):
    """MODEL.ROI_HEADS, of both toolkits: the classification loss."""

    loss: Literal["CrossEntropy", "FocalLoss"] = option(
        "CrossEntropy",
        'classification loss of the ROI head; "FocalLoss" is Unbiased Teacher\'s, of a softmax',
    )


@dataclass(frozen=True)
class FocalOptions(Options):
    """MODEL.ROI_HEADS, of both toolkits, when LOSS is FocalLoss."""

    focal_gamma: float = option(1.5, "exponent of the focal loss: 0 or at least 1", low=0)


@dataclass(frozen=True)
class ROIBoxHeadOptions(Options):
    """MODEL.ROI_BOX_HEAD."""

    pooler_resolution: int = option(7, "height and width of the features pooled from a proposal")
    fc_dim: int = option(1024, "width of the two fully connected layers", low=1)
    smooth_l1_beta: float = option(
        0.0, "width of the box losses' quadratic part, in target units; 0 is plain L1", low=0
    )


@dataclass(frozen=True)
class FCOSHeadOptions(Options):
    """MODEL.FCOS."""

    num_convs: int = option(4, "convolutions before the outputs, in each of two towers", low=1)
    prior_prob: float = option(
        0.01, "class probability that training starts from", above=0, below=1
    )
    quality: Literal["iou", "centerness"] = option(
        "iou",
        "what the quality branch learns: the IoU of the predicted box (Dense Teacher), or how "
        "central a location is (FCOS)",
    )
    center_sampling_radius: float = option(
        1.5, "a box is learned this many strides around its center; 0 learns it everywhere", low=0
    )
    sizes_of_interest: list[float] = option(
        [64.0, 128.0, 256.0, 512.0],
        "a level learns the boxes whose farthest edge is between two of these distances in pixels",
        above=0,
    )
    focal_loss_alpha: float = option(
        0.25, "weight of objects in the focal loss, 1 minus it of background", low=0, high=1
    )
    focal_loss_gamma: float = option(2.0, "exponent of the focal loss: 0 or at least 1", low=0)
    score_thresh_test: float = option(
        0.05, "class probability above which a location becomes a detection", low=0, high=1
    )
    topk_candidates_test: int = option(1000, "best candidates of a level before NMS", low=1)
    nms_thresh_test: float = option(
        0.6, "a detection is dropped above this IoU with a better one", low=0, high=1
    )


@dataclass(frozen=True)
class RetinaNetHeadOptions(Options):
    """MODEL.RETINANET."""

    norm: Literal["", "GN"] = option(
        "GN", "normalization of the towers: none, or GroupNorm of 32 groups"
    )
    prior_prob: float = option(
        0.01, "class probability that training starts from", above=0, below=1
    )
    iou_thresholds: list[float] = option(
        [0.4, 0.5],
        "an anchor is background below the first, an object from the second IoU on",
        low=0,
        high=1,
    )
    focal_loss_alpha: float = option(
        0.25, "weight of objects in the focal loss, 1 minus it of background", low=0, high=1
    )
    focal_loss_gamma: float = option(2.0, "exponent of the focal loss: 0 or at least 1", low=0)
    smooth_l1_loss_beta: float = option(
        0.1, "width of the box loss's quadratic part, in target units; 0 is plain L1", low=0
    )
    score_thresh_test: float = option(
        0.05, "class probability above which an anchor becomes a detection", low=0, high=1
    )
    topk_candidates_test: int = option(1000, "best candidates of a level before NMS", low=1)
    nms_thresh_test: float = option(
        0.5, "a detection is dropped above this IoU with a better one", low=0, high=1
    )


@dataclass(frozen=True)
class DetectionOptions(Options):
    """TEST, of both toolkits: what a detector returns."""

    detections_per_image: int = option(100, "the best detections of an image are kept", low=1)


@dataclass(frozen=True)
class DetectorOptions:
    """What all detectors of torchvision's parts are made with."""

    pixels: PixelOptions = field(default_factory=PixelOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    resnets: ResNetOptions = field(default_factory=ResNetOptions)
    fpn: FPNOptions = field(default_factory=FPNOptions)
    detections: DetectionOptions = field(default_factory=DetectionOptions)


@dataclass(frozen=True)
class FasterRCNNOptions(DetectorOptions):
    """All settings of `TorchvisionFasterRCNN`, by group.

    Example:
        >>> options = FasterRCNNOptions(resnets=ResNetOptions(depth=18, norm="BN"))
        >>> options.resnets.depth, options.rpn.nms_thresh
        (18, 0.7)
    """

    levels: LevelOptions = field(default_factory=LevelOptions)
    anchor_generator: AnchorOptions = field(default_factory=AnchorOptions)
    rpn: RPNOptions = field(default_factory=RPNOptions)
    roi_heads: ROIHeadsOptions = field(default_factory=ROIHeadsOptions)
    roi_loss: ROILossOptions = field(default_factory=ROILossOptions)
    focal: FocalOptions = field(default_factory=FocalOptions)
    roi_box_head: ROIBoxHeadOptions = field(default_factory=ROIBoxHeadOptions)


@dataclass(frozen=True)
class FCOSOptions(DetectorOptions):
    """All settings of `TorchvisionFCOS`, by group."""

    levels: DenseLevelOptions = field(default_factory=DenseLevelOptions)
    fcos: FCOSHeadOptions = field(default_factory=FCOSHeadOptions)


def _nine_anchors() -> AnchorOptions:
    """Three sizes, a third of an octave apart, for each of RetinaNet's levels."""
    sizes = [[edge * 2 ** (third / 3) for third in range(3)] for edge in (32, 64, 128, 256, 512)]
    return AnchorOptions(sizes=sizes)


@dataclass(frozen=True)
class RetinaNetOptions(DetectorOptions):
    """All settings of `TorchvisionRetinaNet`, by group."""

    levels: DenseLevelOptions = field(default_factory=DenseLevelOptions)
    anchor_generator: AnchorOptions = field(default_factory=_nine_anchors)
    retinanet: RetinaNetHeadOptions = field(default_factory=RetinaNetHeadOptions)
