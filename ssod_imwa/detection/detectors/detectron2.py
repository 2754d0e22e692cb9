"""detectron2's detectors behind our interface: Faster R-CNN, RetinaNet, FCOS and their kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ROIAlign, cat
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.detection.detectors.base import Detector, Objective
from ssod_imwa.detection.detectors.detectron2_export import (
    export_model,
    lazy_loading_code,
    stock_config,
)
from ssod_imwa.detection.detectors.detectron2_parts import (
    DenseModelParts,
    ModelParts,
    RegionParts,
    has_dense_maps,
    has_regions,
)
from ssod_imwa.detection.detectors.export import write_exported
from ssod_imwa.detection.detectors.parts import Parts
from ssod_imwa.detection.detectors.plain_attributes import PlainAttributes
from ssod_imwa.detection.detectors.weights import load_strictly, state_in
from ssod_imwa.detection.losses import multiclass_focal_loss
from ssod_imwa.engine.checkpoint.foreign import read_content
from ssod_imwa.errors import ConfigError, UserError, WeightsError

LAZY_THAWING = (
    "MODEL.DETECTRON2.CONFIG to a LazyConfig of yours, in which model.backbone.bottom_up has "
    'freeze_at = 0 and stem.norm = stages.norm = "BN", see docs/detectron2.md'
)


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


class ExactROIAlign(ROIAlign):
    """detectron2's ROIAlign, which leaves the corners of regions in float32.

    detectron2 rounds them to the type of the features. Under autocast in bfloat16 they would move
    by up to half a pixel beyond 128 px, and by up to 1 beyond 256.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """As the base class's, computed in float32; of the type of `input`."""
        return super().forward(input.float(), rois.float()).to(input.dtype)


class Detectron2Detector(Detector):
    """A detectron2 model; `build_detectron2_detector` makes one.

    It has the ability "regions" if it is a Faster R-CNN with one stage of heads, and the ability
    "dense" if it is an FCOS or a RetinaNet.

    Args:
        model: a meta-architecture with detectron2's calling convention (GeneralizedRCNN, RetinaNet,
            FCOS, ...): lists of dicts in, losses or `Instances` out.
        num_classes: C.
        image_format: order of the channels that the model expects, "RGB" or "BGR".
        source: what detectron2 builds the model from: its configuration, or the name of a
            LazyConfig; None for a model that need not be exported.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        image_format: str,
        source: CfgNode | str | None = None,
    ) -> None:
        super().__init__(num_classes)
        self.model = model
        self.image_format = image_format
        self.source = source
        checks = {"regions": has_regions, "dense": has_dense_maps}
        self.abilities = frozenset(name for name, check in checks.items() if check(model))
        self.size_divisor = max(1, getattr(model.backbone, "size_divisibility", 1))
        if isinstance(source, str):  # no key reaches into a LazyConfig
            self.thawing = LAZY_THAWING
        self._attributes = PlainAttributes({"model": model}, DenseDetector, "loss_normalizer")

    @property
    def name(self) -> str:
        return f"detectron2's {type(self.model).__name__}"

    def parts(self, images: Sequence[torch.Tensor]) -> Parts:
        if self.image_format != "RGB":
            images = [image.flip(0) for image in images]
        kinds: dict[str, type[ModelParts]] = {"regions": RegionParts, "dense": DenseModelParts}
        kind = next((kinds[ability] for ability in self.abilities), ModelParts)
        return kind(self.name, self.model, images)

    def forward(
        self, images: Sequence[torch.Tensor], objective: Objective
    ) -> dict[str, torch.Tensor]:
        with EventStorage():  # the model's own statistics; it does not run without a storage
            return super().forward(images, objective)

    def outside_state(self) -> dict[str, float]:
        return self._attributes.state_dict()

    def load_outside_state(self, state: dict[str, float]) -> None:
        self._attributes.load_state_dict(state)

    def load_weights(self, weights: str) -> None:
        """Fill the model through detectron2's checkpointer, which converts names where it can.

        Args:
            weights: "" for none; a checkpoint of ours; or what detectron2's MODEL.WEIGHTS takes:
                `detectron2://...`, a model of its zoo as .pkl, ImageNet backbones, or a .pth.

        Raises:
            WeightsError: the file cannot be read, or does not fit this model.
        """
        if not weights:
            return
        if (state := self._complete_state(weights)) is not None:
            load_strictly(self, state, weights)
            return
        before = {name: x.clone() for name, x in self.model.state_dict().items()}
        try:
            DetectionCheckpointer(self.model).load(weights)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise WeightsError(f"MODEL.WEIGHTS = {weights!r} cannot be loaded ({error})") from error
        after = self.model.state_dict()
        if all(torch.equal(before[name], after[name]) for name in before):
            raise WeightsError(f"MODEL.WEIGHTS = {weights!r}: nothing in it fits the model")

    def _complete_state(self, weights: str) -> Mapping[str, Any] | None:
        """The state in a file of ours, or of another program if its names are all the model's."""
        if weights.endswith((".pkl", ".pyth")) or not Path(weights).is_file():
            return None
        content = read_content(Path(weights))
        try:
            state = state_in(content, weights)
        except WeightsError:  # detectron2 has its own rules of what is the model in a file
            return None
        if all(name.startswith("model.") for name in state):
            return state
        complete = state.keys() == self.model.state_dict().keys()
        return {f"model.{name}": x for name, x in state.items()} if complete else None

    def export(self, path: Path, *, min_size: int, max_size: int, about: Mapping[str, Any]) -> str:
        """Write a checkpoint and, unless a LazyConfig is it, a configuration beside it (.yaml)."""
        if self.source is None:
            raise UserError(f"{self.name} cannot be exported (it was made without a source)")
        state = self.model.state_dict()
        if isinstance(self.source, str):
            write_exported(path, state, min_size=min_size, max_size=max_size, about=about)
            return lazy_loading_code(self.source, self.num_classes, path)
        return export_model(
            state, self.source, path, min_size=min_size, max_size=max_size, about=about
        )


def build_detectron2_detector(
    cfg: CfgNode,
    *,
    num_classes: int,
    lazy_config: str = "",
    loss: str = "CrossEntropy",
    focal_gamma: float = 1.5,
) -> Detectron2Detector:
    """The model that MODEL describes, or a LazyConfig if one is named.

    Its weights are random; `load_weights` fills them.

    Args:
        cfg: detectron2's configuration; it may have more keys.
        num_classes: C.
        lazy_config: a LazyConfig (.py) of the model zoo or a file, instead of `cfg`.
        loss: classification loss of the ROI head, as in `ROILossOptions`.
        focal_gamma: as in `FocalOptions`.

    Raises:
        ConfigError: detectron2 cannot build it.
    """
    source: CfgNode | str
    if lazy_config:
        model = _lazy_model(lazy_config, num_classes)
        image_format = getattr(model, "input_format", None) or "BGR"
        source = lazy_config
    else:
        cfg = plain_config(cfg, num_classes)
        try:
            model = build_model(cfg)
        except (KeyError, ValueError, AssertionError) as error:
            raise ConfigError(f"MODEL: detectron2 cannot build it ({error})") from error
        image_format = cfg.INPUT.FORMAT
        source = stock_config(cfg)
    if loss == "FocalLoss":
        _use_focal_loss(model, focal_gamma)
    for part in model.modules():
        if type(part) is ROIAlign:  # poolers make them by name: the class cannot be chosen
            part.__class__ = ExactROIAlign
    return Detectron2Detector(
        model, num_classes=num_classes, image_format=image_format, source=source
    )


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
    heads = getattr(model, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    if predictor is None:  # dense detectors have their own focal loss
        return
    if isinstance(predictor, nn.ModuleList):  # one for each stage of a cascade
        raise ConfigError(
            f"MODEL.ROI_HEADS.LOSS = 'FocalLoss' is not allowed for {type(heads).__name__}, which "
            "have several box predictors (use CrossEntropy)"
        )
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
