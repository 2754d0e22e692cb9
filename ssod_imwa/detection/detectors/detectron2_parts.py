"""detectron2's models at work on some images: any, those with regions, those with dense maps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torchvision.ops import clip_boxes_to_image

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.detection.detectors.parts import (
    DenseMaps,
    Parts,
    RegionOutputs,
    Regions,
    SampledBoxes,
    borrowed,
)

# FCOS's names -> those of every other dense detector.
RENAMED = {
    "loss_fcos_cls": "loss_cls",
    "loss_fcos_loc": "loss_box_reg",
    "loss_fcos_ctr": "loss_centerness",
}


def has_regions(model: nn.Module) -> bool:
    """Whether a model is a Faster R-CNN with one stage of heads and a softmax over its classes."""
    if not (isinstance(model, GeneralizedRCNN) and isinstance(model.proposal_generator, RPN)):
        return False
    heads = model.roi_heads
    return (
        isinstance(heads, StandardROIHeads)
        # Cascades and panoptic models work in another way, which `RegionParts` does not repeat.
        and type(heads)._forward_box is StandardROIHeads._forward_box
        and type(model).inference is GeneralizedRCNN.inference
        and isinstance(heads.box_predictor, FastRCNNOutputLayers)
        and not heads.box_predictor.use_sigmoid_ce
    )


def has_dense_maps(model: nn.Module) -> bool:
    """Whether a model is an FCOS or a RetinaNet that predicts as detectron2's own do."""
    return any(
        isinstance(model, kind) and type(model).forward_inference is kind.forward_inference
        for kind in (FCOS, RetinaNet)
    )


class ModelParts(Parts):
    """Any model, through its calling convention: lists of dicts in, losses or `Instances` out.

    Args:
        detector: its name, for messages.
        model: the meta-architecture.
        images: in the model's order of channels.
    """

    def __init__(self, detector: str, model: nn.Module, images: Sequence[torch.Tensor]) -> None:
        super().__init__(detector, images)
        self._model: Any = model  # whose modules a type checker takes for tensors

    def losses(self, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
        self.check_count("targets", targets)
        inputs = [
            {**entry, "instances": instances}
            for entry, instances in zip(self._inputs(), self._instances(targets), strict=True)
        ]
        return {RENAMED.get(name, name): value for name, value in self._model(inputs).items()}

    def detections(self) -> list[Detections]:
        return [_detections(result["instances"]) for result in self._model(self._inputs())]

    def _inputs(self) -> list[dict[str, Any]]:
        return [{"image": image} for image in self.images]

    def _instances(self, targets: Sequence[Targets]) -> list[Instances]:
        """Targets as detectron2 takes them."""
        return [
            Instances(
                tuple(image.shape[-2:]), gt_boxes=Boxes(target.boxes), gt_classes=target.labels
            )
            for image, target in zip(self.images, targets, strict=True)
        ]


class DenseModelParts(ModelParts):
    """An FCOS or RetinaNet, of which `has_dense_maps` holds."""

    def dense_maps(self) -> DenseMaps:
        return self._maps

    @cached_property
    def _maps(self) -> DenseMaps:
        model = self._model
        features = model.backbone(model.preprocess_image(self._inputs()).tensor)
        features = [features[name] for name in model.head_in_features]
        # RetinaNet has no third output; FCOS's is the centerness.
        outputs = model._transpose_dense_predictions(
            model.head(features), [model.num_classes, 4, 1][: 3 if isinstance(model, FCOS) else 2]
        )
        logits, deltas, *quality = [torch.cat(levels, dim=1).float() for levels in outputs]
        anchors = Boxes.cat(model.anchor_generator(features)).tensor
        # In pixels also where the deltas are negative: FCOS's transform clips them at 0.
        boxes = model.box2box_transform.apply_deltas(
            deltas.flatten(0, 1), anchors.repeat(len(deltas), 1)
        )
        return DenseMaps(
            logits,
            boxes.view_as(deltas),
            quality[0].squeeze(2) if quality else None,
            tuple(level.shape[1] for level in outputs[0]),
        )


class RegionParts(ModelParts, Regions):
    """A Faster R-CNN, of which `has_regions` holds; features are shared by what is asked."""

    @property
    def regions(self) -> Regions:
        return self

    @cached_property
    def _batch(self) -> ImageList:
        return self._model.preprocess_image(self._inputs())

    @cached_property
    def _features(self) -> dict[str, torch.Tensor]:
        return self._model.backbone(self._batch.tensor)

    def detections(self) -> list[Detections]:
        network = self._model.proposal_generator
        # detectron2 keeps the numbers of proposals by whether it trains.
        limits = [network.pre_nms_topk, network.post_nms_topk]
        with borrowed(limits, from_=self.training_proposals, to=False):
            proposals, _ = network(self._batch, self._features, None)
        results, _ = self._model.roi_heads(self._batch, self._features, proposals, None)
        results = self._model._postprocess(results, self._inputs(), self._batch.image_sizes)
        return [_detections(result["instances"]) for result in results]

    def propose(
        self, targets: Sequence[Targets]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        self.check_count("targets", targets)
        proposals, losses = self._model.proposal_generator(
            self._batch, self._features, self._instances(targets)
        )
        return [item.proposal_boxes.tensor for item in proposals], losses

    @torch.no_grad()
    def sample(
        self, proposals: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> list[SampledBoxes]:
        self.check_count("targets", targets)
        self.check_count("lists of proposals", proposals)
        instances = [
            Instances(
                size,
                proposal_boxes=Boxes(boxes),
                objectness_logits=boxes.new_zeros(len(boxes)),  # asked for, and not looked at
            )
            for size, boxes in zip(self._batch.image_sizes, proposals, strict=True)
        ]
        sampled = self._model.roi_heads.label_and_sample_proposals(
            instances, self._instances(targets)
        )
        # An image without targets leaves boxes to match out.
        return [
            SampledBoxes(
                item.proposal_boxes.tensor,
                item.gt_classes,
                (item.gt_boxes if item.has("gt_boxes") else item.proposal_boxes).tensor,
            )
            for item in sampled
        ]

    def predict(self, boxes: Sequence[torch.Tensor]) -> RegionOutputs:
        self.check_count("lists of boxes", boxes)
        heads = self._model.roi_heads
        features = [self._features[name] for name in heads.box_in_features]
        pooled = heads.box_pooler(features, [Boxes(item) for item in boxes])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        # A predictor without classes refines a box in one way for all.
        deltas = deltas.unflatten(1, (-1, 4)).expand(-1, heads.num_classes, 4)
        return RegionOutputs(list(boxes), logits, deltas)

    def refine(self, outputs: RegionOutputs) -> list[torch.Tensor]:
        transform = self._model.roi_heads.box_predictor.box2box_transform
        refined = transform.apply_deltas(outputs.deltas.flatten(1), torch.cat(outputs.boxes))
        of_images = refined.view(outputs.deltas.shape).split([len(x) for x in outputs.boxes])
        return [
            clip_boxes_to_image(boxes, size)
            for boxes, size in zip(of_images, self._batch.image_sizes, strict=True)
        ]

    def box_loss(self, outputs: RegionOutputs, sampled: Sequence[SampledBoxes]) -> torch.Tensor:
        predictor = self._model.roi_heads.box_predictor
        loss = predictor.box_reg_loss(
            torch.cat([item.boxes for item in sampled]),
            torch.cat([item.matched for item in sampled]),
            outputs.deltas.flatten(1),
            torch.cat([item.labels for item in sampled]),
        )
        return loss * predictor.loss_weight.get("loss_box_reg", 1.0)


def _detections(instances: Instances) -> Detections:
    return Detections(instances.pred_boxes.tensor, instances.pred_classes, instances.scores)
