"""detectron2's detectors behind our interface: Faster R-CNN, RetinaNet, FCOS and their kin."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import cat
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.detection.detectors.base import Detector, groups_of_equal_size
from ssod_imwa.detection.detectors.weights import load_strictly, read_state
from ssod_imwa.detection.losses import multiclass_focal_loss
from ssod_imwa.engine.modes import evaluating
from ssod_imwa.errors import ConfigError, WeightsError
from ssod_imwa.integrations.detectron2.trainer_parts import PlainAttributes

logger = logging.getLogger(__name__)

# FCOS's names -> those of every other dense detector.
RENAMED = {
    "loss_fcos_cls": "loss_cls",
    "loss_fcos_loc": "loss_box_reg",
    "loss_fcos_ctr": "loss_centerness",
}


class FocalFastRCNNOutputLayers(FastRCNNOutputLayers):
    """detectron2's box predictor with Unbiased Teacher's focal loss instead of the cross-entropy.

    Attributes:
        focal_gamma: exponent of `multiclass_focal_loss`.
    """

    focal_gamma: float

    def losses(self, predictions: Any, proposals: list[Instances]) -> dict[str, torch.Tensor]:
        """As the base class's; `loss_cls` is the focal loss."""
        losses = super().losses(predictions, proposals)
        if proposals:
            labels = cat([p.gt_classes for p in proposals])
            focal = multiclass_focal_loss(predictions[0], labels, gamma=self.focal_gamma)
            losses["loss_cls"] = focal * self.loss_weight.get("loss_cls", 1.0)
        return losses


class Detectron2Detector(Detector):
    """A detectron2 model; `build_detectron2_detector` makes one.

    Args:
        model: a meta-architecture with detectron2's calling convention (GeneralizedRCNN, RetinaNet,
            FCOS, ...): lists of dicts in, losses or `Instances` out.
        num_classes: C.
        image_format: order of the channels that the model expects, "RGB" or "BGR".
    """

    def __init__(self, model: nn.Module, *, num_classes: int, image_format: str) -> None:
        super().__init__(num_classes)
        self.model = model
        self.image_format = image_format
        self._attributes = PlainAttributes({"model": model}, DenseDetector, "loss_normalizer")

    def forward(
        self, images: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> dict[str, torch.Tensor]:
        self.check_losses(images, targets)
        batch = self._inputs(images)
        for entry, image, target in zip(batch, images, targets, strict=True):
            instances = Instances(tuple(image.shape[-2:]))
            instances.gt_boxes = Boxes(target.boxes)
            instances.gt_classes = target.labels
            entry["instances"] = instances
        with EventStorage():  # the model's own statistics; it does not run without a storage
            losses = self.model(batch)
        return {RENAMED.get(name, name): value for name, value in losses.items()}

    def outside_state(self) -> dict[str, float]:
        return self._attributes.state_dict()

    def load_outside_state(self, state: dict[str, float]) -> None:
        self._attributes.load_state_dict(state)

    @torch.no_grad()
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        divisor = max(1, getattr(self.model.backbone, "size_divisibility", 1))
        found: dict[int, Detections] = {}
        with evaluating(self):
            for indices in groups_of_equal_size(images, divisor):
                results = self.model(self._inputs([images[i] for i in indices]))
                for index, result in zip(indices, results, strict=True):
                    instances = result["instances"]
                    found[index] = Detections(
                        instances.pred_boxes.tensor, instances.pred_classes, instances.scores
                    )
        return [found[index] for index in range(len(images))]

    def _inputs(self, images: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
        return [
            {"image": image if self.image_format == "RGB" else image.flip(0)} for image in images
        ]


def build_detectron2_detector(cfg: CfgNode, num_classes: int) -> Detectron2Detector:
    """The model that MODEL describes, or MODEL.DETECTRON2.CONFIG if that is a LazyConfig (.py).

    Its weights are random; `load_weights` fills them.

    Args:
        cfg: a configuration with `MODEL.TOOLKIT: detectron2`.
        num_classes: C.

    Raises:
        ConfigError: detectron2 cannot build it.
    """
    if cfg.MODEL.DETECTRON2.CONFIG.endswith(".py"):
        model = _lazy_model(cfg.MODEL.DETECTRON2.CONFIG, num_classes)
        image_format = getattr(model, "input_format", None) or "BGR"
    else:
        cfg = plain_config(cfg, num_classes)
        try:
            model = build_model(cfg)
        except (KeyError, ValueError, AssertionError) as error:
            raise ConfigError(f"MODEL: detectron2 cannot build it ({error})") from error
        image_format = cfg.INPUT.FORMAT
    if cfg.MODEL.ROI_HEADS.LOSS == "FocalLoss":
        _use_focal_loss(model, cfg.MODEL.ROI_HEADS.FOCAL_GAMMA)
    return Detectron2Detector(model, num_classes=num_classes, image_format=image_format)


def plain_config(cfg: CfgNode, num_classes: int) -> CfgNode:
    """A copy for detectron2's own builders: on the CPU, with the classes of the data."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    return cfg


def _lazy_model(path: str, num_classes: int) -> nn.Module:
    local = Path(path)
    try:
        lazy = LazyConfig.load(path) if local.is_file() else model_zoo.get_config(path)
    except (RuntimeError, FileNotFoundError) as error:
        raise ConfigError(f"MODEL.DETECTRON2.CONFIG = {path!r} is not allowed ({error})") from error
    model = lazy.model
    if "num_classes" in model:
        model.num_classes = num_classes
    elif "roi_heads" in model:
        model.roi_heads.num_classes = num_classes
    else:
        raise ConfigError(
            f"MODEL.DETECTRON2.CONFIG = {path!r} is not allowed (its model has neither num_classes "
            "nor roi_heads.num_classes)"
        )
    return instantiate(model)


def _use_focal_loss(model: nn.Module, gamma: float) -> None:
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if predictor is None:  # dense detectors have their own focal loss
        return
    if type(predictor) is not FastRCNNOutputLayers:
        raise ConfigError(
            "MODEL.ROI_HEADS.LOSS = 'FocalLoss' is not allowed for a box predictor of type "
            f"{type(predictor).__name__} (must be FastRCNNOutputLayers; use CrossEntropy)"
        )
    if predictor.use_sigmoid_ce:
        raise ConfigError(
            "MODEL.ROI_HEADS.LOSS = 'FocalLoss' with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True is not "
            "allowed (the focal loss is one of a softmax)"
        )
    # detectron2's ROI heads name the class of their predictor in their code: it cannot be chosen.
    predictor.__class__ = FocalFastRCNNOutputLayers
    predictor.focal_gamma = gamma


def load_weights(detector: Detectron2Detector, weights: str) -> None:
    """Fill the model through detectron2's checkpointer, which converts names where it can.

    Args:
        detector: what `build_detectron2_detector` made.
        weights: "" for none; a checkpoint of ours; or what detectron2's MODEL.WEIGHTS takes:
            `detectron2://...`, a model of its zoo as .pkl, ImageNet backbones, or a .pth.

    Raises:
        WeightsError: the file cannot be read, or does not fit this model.
    """
    if not weights:
        return
    if (state := _own_state(weights)) is not None:
        load_strictly(detector, state, weights)
        return
    before = {name: x.clone() for name, x in detector.model.state_dict().items()}
    try:
        DetectionCheckpointer(detector.model).load(weights)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise WeightsError(f"MODEL.WEIGHTS = {weights!r} cannot be loaded ({error})") from error
    after = detector.model.state_dict()
    if all(torch.equal(before[name], after[name]) for name in before):
        raise WeightsError(f"MODEL.WEIGHTS = {weights!r}: nothing in it fits the model")


def _own_state(weights: str) -> Mapping[str, Any] | None:
    """The state in a file of this package, whose names begin with this class's attribute."""
    if not weights.endswith(".pth") or not Path(weights).is_file():
        return None
    try:
        state = read_state(weights)
    except WeightsError:  # detectron2 reads files with arbitrary objects, too
        return None
    return state if all(name.startswith("model.") for name in state) else None
