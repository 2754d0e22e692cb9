"""What an objective sees of a detector: its parts, at work on one batch of images.

What not every detector can do has a name, an ability: "regions" of two-stage detectors, "dense" of
those that predict at every location.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ssod_imwa.detection.data.records import Detections, Targets
from ssod_imwa.errors import ConfigError

ABILITIES = {"regions": "score given boxes", "dense": "map all locations"}


def missing_ability(user: str, ability: str, detector: str) -> ConfigError:
    """The error of who uses an ability that a detector does not have."""
    return ConfigError(
        f"{user} needs a detector with the ability {ability!r} (to {ABILITIES[ability]}), which "
        f"{detector} does not have"
    )


@dataclass
class SampledBoxes:
    """Boxes of one image drawn for the losses, each with what it is to learn.

    Attributes:
        boxes: float32 (n, 4), pixels.
        labels: int64 (n,), the class, or C for background.
        matched: float32 (n, 4), the target's box; of no meaning for background.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    matched: torch.Tensor


@dataclass
class RegionOutputs:
    """What the heads say of R boxes of all images.

    Attributes:
        boxes: the boxes of each image, R in all.
        logits: float32 (R, C+1), background last; of a softmax.
        deltas: float32 (R, C, 4), each class's change of the box in the detector's own units.
    """

    boxes: list[torch.Tensor]
    logits: torch.Tensor
    deltas: torch.Tensor


@dataclass
class ScoredRegions:
    """The n boxes of one image in the eyes of a detector.

    Attributes:
        probabilities: float32 (n, C+1), background last.
        boxes: float32 (n, C, 4), refined for each class, clipped to the image.
    """

    probabilities: torch.Tensor
    boxes: torch.Tensor


@dataclass
class DenseMaps:
    """Predictions at the N locations of a batch, level after level, padded border included.

    A location with several anchors counts once for each. Two batches whose images have the same
    sizes have the same locations.

    Attributes:
        logits: float32 (B, N, C), of a sigmoid for each class.
        boxes: float32 (B, N, 4), pixels, not clipped.
        quality: float32 (B, N), logits of how well the box fits, or None where nothing says so.
        levels: number of locations of each level, N in all.
    """

    logits: torch.Tensor
    boxes: torch.Tensor
    quality: torch.Tensor | None
    levels: tuple[int, ...]


@contextmanager
def borrowed(limits: Sequence[dict[Any, int]], *, from_: Any, to: Any) -> Iterator[None]:
    """While entered, each dictionary has the value of one key at another key, too."""
    before = [numbers[to] for numbers in limits]
    for numbers in limits:
        numbers[to] = numbers[from_]
    try:
        yield
    finally:
        for numbers, value in zip(limits, before, strict=True):
            numbers[to] = value


class Regions(ABC):
    """A two-stage detector's work on proposals; what the ability "regions" means.

    A loss of its own on sampled proposals, and another sampling for the boxes::

        proposals, losses = regions.propose(confident)
        sampled = regions.sample(proposals, confident)
        logits = regions.predict([item.boxes for item in sampled]).logits
        losses["loss_cls"] = my_loss(logits, torch.cat([item.labels for item in sampled]))
        sampled = regions.sample(proposals, precise)
        outputs = regions.predict([item.boxes for item in sampled])
        losses["loss_box_reg"] = regions.box_loss(outputs, sampled)
    """

    @abstractmethod
    def propose(
        self, targets: Sequence[Targets]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The proposals of each image, (n, 4) without gradient, and the losses of proposing.

        The losses are `loss_rpn_cls` and `loss_rpn_loc` with respect to the targets. For training.
        """

    @abstractmethod
    def sample(
        self, proposals: Sequence[torch.Tensor], targets: Sequence[Targets]
    ) -> list[SampledBoxes]:
        """Proposals and target boxes of each image, assigned and drawn as for the own losses."""

    @abstractmethod
    def predict(self, boxes: Sequence[torch.Tensor]) -> RegionOutputs:
        """What the heads say of boxes, (n, 4) for each image; gradients flow to all features."""

    @abstractmethod
    def refine(self, outputs: RegionOutputs) -> list[torch.Tensor]:
        """The boxes of each image, (n, C, 4), changed for each class and clipped to the image."""

    @abstractmethod
    def box_loss(self, outputs: RegionOutputs, sampled: Sequence[SampledBoxes]) -> torch.Tensor:
        """The detector's own loss of refined boxes, as a scalar.

        Args:
            outputs: of the sampled boxes.
            sampled: boxes with their targets; background counts in the divisor alone.
        """

    @torch.no_grad()
    def score(self, boxes: Sequence[torch.Tensor]) -> list[ScoredRegions]:
        """`predict` as probabilities and refined boxes of each image, without gradient."""
        outputs = self.predict(boxes)
        probabilities = outputs.logits.softmax(-1).split([len(item) for item in boxes])
        return [
            ScoredRegions(*pair) for pair in zip(probabilities, self.refine(outputs), strict=True)
        ]


class Parts(ABC):
    """A detector at work on a batch of images, which are padded to one size.

    `Detector.parts` makes it. What several calls need, above all the features, is computed once,
    when first asked for, and with a gradient unless that call stands under `torch.no_grad`.

    Args:
        detector: its name, for messages.
        images: uint8 (3, H, W) each.

    Attributes:
        user: name of the objective at work, for messages.
        training_proposals: whether `detections` looks at as many proposals as training does, not at
            as many as evaluation; means nothing without a second stage.
    """

    training_proposals: bool = False

    def __init__(self, detector: str, images: Sequence[torch.Tensor]) -> None:
        self.detector = detector
        self.images = images
        self.user = "the caller"

    @abstractmethod
    def losses(self, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
        """The detector's own losses of the images' boxes, which may be none; for training.

        Returns:
            Scalars: `loss_cls` and `loss_box_reg`; two-stage detectors have `loss_rpn_cls` and
            `loss_rpn_loc`, too, and FCOS has `loss_quality` or `loss_centerness`. Every trainable
            parameter receives a gradient from their sum.

        Raises:
            ValueError: the numbers of images and targets differ.
        """

    @abstractmethod
    def detections(self) -> list[Detections]:
        """Detections of each image, by falling score; for eval mode."""

    @property
    def regions(self) -> Regions:
        """The second stage.

        Raises:
            ConfigError: the detector lacks the ability "regions".
        """
        raise missing_ability(self.user, "regions", self.detector)

    def dense_maps(self) -> DenseMaps:
        """Predictions at all locations.

        Raises:
            ConfigError: the detector lacks the ability "dense".
        """
        raise missing_ability(self.user, "dense", self.detector)

    def check_count(self, what: str, items: Sequence[object]) -> None:
        """Raise ValueError unless there is one item for each image."""
        if len(items) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images and {len(items)} {what} are not allowed (must be equal)"
            )
