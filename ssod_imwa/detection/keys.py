"""Every key of detection, and what it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssod_imwa.config.options import BELOW_100, Options, option
from ssod_imwa.config.sections import Section
from ssod_imwa.detection.data.geometric_views import GeometricOptions
from ssod_imwa.detection.data.views import StrongKindOptions, StrongOptions, ViewOptions
from ssod_imwa.detection.detectors.options import (
    IS_LITE,
    IS_NOT_LITE,
    IS_RESNET,
    AnchorOptions,
    BackboneOptions,
    DenseLevelOptions,
    DetectionOptions,
    FCOSHeadOptions,
    FocalOptions,
    FPNOptions,
    ImageOptions,
    LevelOptions,
    LitePixelOptions,
    PixelOptions,
    ResNetOptions,
    RetinaNetHeadOptions,
    ROIBoxHeadOptions,
    ROIHeadsOptions,
    ROILossOptions,
    RPNOptions,
)
from ssod_imwa.detection.label_pictures import PictureOptions
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.detection.methods.dense_teacher import DenseTeacher, DenseTeacherOptions
from ssod_imwa.detection.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.detection.methods.soft_teacher import SoftTeacher, SoftTeacherOptions
from ssod_imwa.detection.methods.supervised import Supervised, SupervisedOptions
from ssod_imwa.detection.methods.unbiased_teacher import UnbiasedTeacher, UnbiasedTeacherOptions

# Values of SSOD.ALGORITHM: what trains, and the options that it takes.
METHODS: dict[str, tuple[type[DetectionMethod], type[Options]]] = {
    "supervised": (Supervised, SupervisedOptions),
    "mean_teacher": (MeanTeacher, MeanTeacherOptions),
    "soft_teacher": (SoftTeacher, SoftTeacherOptions),
    "unbiased_teacher": (UnbiasedTeacher, UnbiasedTeacherOptions),
    "dense_teacher": (DenseTeacher, DenseTeacherOptions),
}


@dataclass(frozen=True)
class MethodOptions(Options):
    """SSOD: the method of training."""

    algorithm: str = option("supervised", "the method of training", choices=tuple(METHODS))


@dataclass(frozen=True)
class ToolkitOptions(Options):
    """MODEL: who makes the detector."""

    toolkit: Literal["torchvision", "detectron2"] = option(
        "torchvision", "whose detectors; with detectron2's come its own keys (docs/detectron2.md)"
    )


@dataclass(frozen=True)
class ArchitectureOptions(Options):
    """MODEL: which of torchvision's detectors; detectron2 has this key, too."""

    meta_architecture: Literal["GeneralizedRCNN", "FCOS", "RetinaNet"] = option(
        "GeneralizedRCNN",
        'the detector: "GeneralizedRCNN" is Faster R-CNN, the others predict at every location',
    )


@dataclass(frozen=True)
class WeightsOptions(Options):
    """MODEL: initial weights of torchvision's detectors; detectron2's have their own key."""

    weights: str = option(
        "",
        '"" (random), "imagenet" (torchvision\'s backbone weights, downloaded), "package:NAME" (an '
        "installed package's, docs/backbones.md), or a file: a detector's state dict (.pth), or an "
        "ImageNet backbone converted from Caffe (MSRA R-50.pkl, R-101.pkl)",
        free=True,
    )


@dataclass(frozen=True)
class Detectron2Options(Options):
    """MODEL.DETECTRON2."""

    config: str = option(
        "",
        "a configuration of detectron2's model zoo, such as \"COCO-Detection/"
        'faster_rcnn_R_50_FPN_1x.yaml", or a file; its MODEL and INPUT.FORMAT are read',
    )


@dataclass(frozen=True)
class ClassesOptions(Options):
    """MODEL.ROI_HEADS, of both toolkits and of every detector."""

    num_classes: int = option(
        0, "object classes without background; 0 takes the number from the labeled data set", low=0
    )


@dataclass(frozen=True)
class SplitOptions(Options):
    """DATASETS.SPLIT: which images keep their labels."""

    percent: float = option(
        100.0,
        "percentage of TRAIN that keeps its labels; the rest joins the unlabeled images",
        above=0,
        high=100,
    )
    fold: int = option(
        1,
        "fold of the split file, or seed of the generated split",
        low=0,
        when={"percent": BELOW_100},
    )
    file: str = option(
        "",
        "split file, relative to ROOT: written by tools/prepare_splits.py, or "
        'COCO_supervision.txt of the public code; "" draws the split',
        when={"percent": BELOW_100},
    )


@dataclass(frozen=True)
class LabeledOptions(Options):
    """DATASETS: images with labels."""

    split: SplitOptions = SplitOptions()


@dataclass(frozen=True)
class UnlabeledOptions(Options):
    """DATASETS: images without labels."""

    train_unlabeled: list[str] = option(
        [], "unlabeled data sets to train on, beside TRAIN's images without labels"
    )


@dataclass(frozen=True)
class UnlabeledBatchOptions(Options):
    """SOLVER: images without labels."""

    ims_per_batch_unlabeled: int = option(
        16, "unlabeled images of an iteration, over all GPUs", low=1
    )


@dataclass(frozen=True)
class GroupingOptions(Options):
    """DATALOADER: which images come together."""

    aspect_ratio_grouping: bool = option(
        True, "put only wide or only tall images in a batch, which saves padding"
    )
    filter_empty_annotations: bool = option(
        True,
        "leave images of TRAIN without a box out of training, labeled and unlabeled; a file of "
        "DATASETS.SPLIT brings its own setting",
    )


@dataclass(frozen=True)
class BatchRuleOptions(Options):
    """DATALOADER: how many images of a batch are labeled."""

    batch_rule: Literal["fixed", "drawn"] = option(
        "fixed",
        'labeled images of a batch: "fixed", always SOLVER.IMS_PER_BATCH; "drawn", each image of '
        "both streams with the probability IMS_PER_BATCH / (IMS_PER_BATCH + "
        "IMS_PER_BATCH_UNLABELED), as in Soft Teacher's public code",
    )


@dataclass(frozen=True)
class DrawOptions(Options):
    """DATALOADER: with BATCH_RULE drawn."""

    drawn_together: int = option(
        5,
        "images of a draw, labeled and unlabeled, at least one of each: those of a GPU in the "
        "public code",
        low=2,
    )


DETECTION = {"TASK": ("detection",)}
TORCHVISION = {**DETECTION, "MODEL.TOOLKIT": ("torchvision",)}
TWO_STAGE = {**TORCHVISION, "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",)}
FCOS = {**TORCHVISION, "MODEL.META_ARCHITECTURE": ("FCOS",)}
RETINANET = {**TORCHVISION, "MODEL.META_ARCHITECTURE": ("RetinaNet",)}
DENSE = {**TORCHVISION, "MODEL.META_ARCHITECTURE": ("FCOS", "RetinaNet")}
WITH_ANCHORS = {**TORCHVISION, "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "RetinaNet")}
DETECTRON2 = {**DETECTION, "MODEL.TOOLKIT": ("detectron2",)}
UNLABELED = {
    **DETECTION,
    "SSOD.ALGORITHM": tuple(
        name for name, (kind, _) in METHODS.items() if "unlabeled" in kind.reads
    ),
}

SECTIONS = (
    Section("SSOD", MethodOptions, DETECTION),
    *(
        Section("SSOD", options, {**DETECTION, "SSOD.ALGORITHM": (name,)})
        for name, (_, options) in METHODS.items()
    ),
    Section("DATASETS", LabeledOptions, DETECTION),
    Section("SSOD", PictureOptions, UNLABELED),
    Section("DATASETS", UnlabeledOptions, UNLABELED),
    Section("DATALOADER", GroupingOptions, DETECTION),
    Section("DATALOADER", BatchRuleOptions, UNLABELED),
    Section("DATALOADER", DrawOptions, {**UNLABELED, "DATALOADER.BATCH_RULE": ("drawn",)}),
    Section("SOLVER", UnlabeledBatchOptions, UNLABELED),
    Section("INPUT", ViewOptions, DETECTION),
    Section("INPUT.STRONG", StrongKindOptions, DETECTION, per_member=True),
    Section(
        "INPUT.STRONG",
        StrongOptions,
        {**DETECTION, "INPUT.STRONG.KIND": ("photometric",)},
        per_member=True,
    ),
    Section(
        "INPUT.STRONG",
        GeometricOptions,
        {**DETECTION, "INPUT.STRONG.KIND": ("geometric",)},
        per_member=True,
    ),
    Section("TEST", DetectionOptions, DETECTION),
    Section("MODEL", ToolkitOptions, DETECTION),
    Section("MODEL", ArchitectureOptions, TORCHVISION),
    Section("MODEL.ROI_HEADS", ClassesOptions, DETECTION),
    Section("MODEL.ROI_HEADS", ROILossOptions, TWO_STAGE),
    Section("MODEL.ROI_HEADS", ROILossOptions, DETECTRON2),
    Section("MODEL.ROI_HEADS", FocalOptions, {**DETECTION, "MODEL.ROI_HEADS.LOSS": ("FocalLoss",)}),
    Section("MODEL.DETECTRON2", Detectron2Options, DETECTRON2),
    Section("MODEL", WeightsOptions, TORCHVISION),
    Section("MODEL.BACKBONE", BackboneOptions, TORCHVISION),
    Section("MODEL", PixelOptions, {**TORCHVISION, "MODEL.BACKBONE.NAME": IS_NOT_LITE}),
    Section("MODEL", LitePixelOptions, {**TORCHVISION, "MODEL.BACKBONE.NAME": IS_LITE}),
    Section("INPUT", ImageOptions, TORCHVISION),
    Section("MODEL.RESNETS", ResNetOptions, {**TORCHVISION, "MODEL.BACKBONE.NAME": IS_RESNET}),
    Section("MODEL.FPN", FPNOptions, TORCHVISION),
    Section("MODEL.FPN", LevelOptions, TWO_STAGE),
    Section("MODEL.FPN", DenseLevelOptions, DENSE),
    Section("MODEL.ANCHOR_GENERATOR", AnchorOptions, WITH_ANCHORS),
    Section("MODEL.RPN", RPNOptions, TWO_STAGE),
    Section("MODEL.ROI_HEADS", ROIHeadsOptions, TWO_STAGE),
    Section("MODEL.ROI_BOX_HEAD", ROIBoxHeadOptions, TWO_STAGE),
    Section("MODEL.FCOS", FCOSHeadOptions, FCOS),
    Section("MODEL.RETINANET", RetinaNetHeadOptions, RETINANET),
)
