"""What FCOS and RetinaNet of torchvision's parts share: maps of all locations, and detections."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.detectors.backbones import Backbone, build_backbone
from ssod_imwa.detection.detectors.options import (
    FCOSHeadOptions,
    FCOSOptions,
    RetinaNetHeadOptions,
    RetinaNetOptions,
)
from ssod_imwa.detection.detectors.parts import DenseMaps, Parts
from ssod_imwa.detection.detectors.torchvision_detector import TorchvisionDetector


def make_dense_backbone(options: FCOSOptions | RetinaNetOptions) -> Backbone:
    """A backbone with random weights whose pyramid has two levels beyond the backbone's maps."""
    channels = options.fpn.out_channels
    return build_backbone(
        options.backbone,
        options.resnets,
        options.fpn,
        levels=options.levels.levels,
        extra_blocks=CoarseLevels(channels, channels),
    )


class CoarseLevels(LastLevelP6P7):
    """The two coarsest levels, in float32 under autocast, too.

    On a CPU, torch 2.14 leaves memory as it was in bfloat16's gradient of a convolution with stride
    2 on maps one pixel high, which p6 of small images is.
    """

    def forward(
        self, p: list[torch.Tensor], c: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        with torch.autocast(p[-1].device.type, enabled=False):
            coarse, names = super().forward([p[-1].float()], c, names)
        return [*p, *coarse[1:]], names


class DenseParts(Parts):
    """A detector that predicts at every location, at work on some images.

    Args:
        detector: the detector.
        images: see `Parts`.
        options: of its head.

    Attributes:
        at_most_locations: see `best_detections`.
    """

    at_most_locations: bool

    def __init__(
        self,
        detector: TorchvisionDetector,
        images: Sequence[torch.Tensor],
        options: FCOSHeadOptions | RetinaNetHeadOptions,
    ) -> None:
        super().__init__(detector.name, images)
        self._backbone, self._group = detector.backbone, detector.group
        self._batch = detector.batch(images)
        self._options = options
        self._limit = detector.options.detections.detections_per_image

    def dense_maps(self) -> DenseMaps:
        return self._maps

    def detections(self) -> list[Detections]:
        return best_detections(
            self._maps,
            self._batch.image_sizes,
            score_thresh=self._options.score_thresh_test,
            topk=self._options.topk_candidates_test,
            at_most_locations=self.at_most_locations,
            nms_thresh=self._options.nms_thresh_test,
            limit=self._limit,
        )

    @cached_property
    def _features(self) -> list[torch.Tensor]:
        return list(self._backbone(self._batch.tensors).values())

    @cached_property
    @abstractmethod
    def _maps(self) -> DenseMaps:
        """The maps, computed once."""

    def _divisor(self, positive: torch.Tensor) -> torch.Tensor:
        """What sums over a batch are divided by: its positive locations, the mean over ranks.

        With the mean of gradients over ranks, that is the sum over the whole batch divided by its
        positive locations.
        """
        return self._group.mean(positive.sum().float()).clamp(min=1)


def one_hot_targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 at the class of each location, like logits (B, N, C); labels outside 0..C-1 have none."""
    return (labels[..., None] == torch.arange(logits.shape[2], device=labels.device)).to(logits)


def check_groups(channels: int) -> None:
    """Raise ValueError where features cannot be normalized in torchvision's 32 groups.

    A group of one channel has a single value on a map of 1 x 1, which torch refuses to normalize.
    """
    if channels < 64 or channels % 32:
        raise ValueError(
            f"out_channels = {channels} is not allowed (must be a multiple of 32, at least 64: the "
            "head normalizes in 32 groups)"
        )


def best_detections(
    maps: DenseMaps,
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_thresh: float,
    topk: int,
    at_most_locations: bool,
    nms_thresh: float,
    limit: int,
) -> list[Detections]:
    """Detections of each image, by falling score.

    On each level the `topk` best pairs of location and class are candidates if their class
    probability p is above the threshold. Their score is p, or sqrt(p * quality).

    Args:
        maps: of the images.
        image_sizes: height and width of each image without padding.
        score_thresh: of class probabilities.
        topk: candidates of a level.
        at_most_locations: take no more candidates from a level than it has locations.
        nms_thresh: a detection is dropped above this IoU with a better one of its class.
        limit: detections of an image.
    """
    probabilities = maps.logits.sigmoid()
    scores = probabilities
    if maps.quality is not None:
        scores = (probabilities * maps.quality.sigmoid()[..., None]).sqrt()
    detections = []
    for number, size in enumerate(image_sizes):
        best = _candidates(
            probabilities[number], maps.levels, score_thresh, topk, at_most_locations
        )
        location, label = best // maps.logits.shape[2], best % maps.logits.shape[2]
        boxes = clip_boxes_to_image(maps.boxes[number, location], size)
        score = scores[number, location, label]
        chosen = batched_nms(boxes, score, label, nms_thresh)[:limit]
        detections.append(Detections(boxes[chosen], label[chosen], score[chosen]))
    return detections


def _candidates(
    probabilities: torch.Tensor,
    levels: Sequence[int],
    score_thresh: float,
    topk: int,
    at_most_locations: bool,
) -> torch.Tensor:
    """Numbers of the candidates of one image among its (N, C) probabilities, flattened."""
    classes = probabilities.shape[1]
    candidates, first = [], 0
    for level in probabilities.split(list(levels)):
        count = min(topk, len(level) if at_most_locations else level.numel())
        values, indices = level.flatten().topk(count)
        candidates.append(indices[values > score_thresh] + first * classes)
        first += len(level)
    return torch.cat(candidates)
