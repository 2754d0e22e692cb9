"""What a detector has to offer to be trained by the methods of this package."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.detection.data.records import Detections
from ssod_imwa.detection.detectors.parts import DenseMaps, Parts, ScoredRegions
from ssod_imwa.detection.detectors.weights import load_strictly, read_state
from ssod_imwa.engine.modes import evaluating
from ssod_imwa.errors import UserError

logger = logging.getLogger(__name__)

Objective = Callable[[Parts], dict[str, torch.Tensor]]
_Answer = TypeVar("_Answer")


class Detector(nn.Module, ABC):
    """A detector whose losses and detections do not show which toolkit it is made of.

    Images are uint8 (3, H, W) RGB tensors of any sizes; a detector never resizes them. Boxes are in
    pixels of the given image, labels 0..C-1.

    Attributes:
        num_classes: C, without background.
        abilities: which of `parts.ABILITIES` it has.
        size_divisor: images are padded to multiples of it.
        group: the processes that share a batch, over which losses count what they divide by.
        thawing: what a user sets so that nothing is frozen, for a message.
    """

    abilities: frozenset[str] = frozenset()
    size_divisor: int = 1
    thawing: str = "MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.group = Group()

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @abstractmethod
    def parts(self, images: Sequence[torch.Tensor]) -> Parts:
        """The detector at work on these images; see `Parts`."""

    def forward(
        self, images: Sequence[torch.Tensor], objective: Objective
    ) -> dict[str, torch.Tensor]:
        """Losses of images.

        Gradients are exchanged by calling the DistributedDataParallel wrapper of a detector, so
        whatever is trained goes through this door. Every trainable parameter has to receive a
        gradient from the sum of the losses.

        Args:
            images: at least one.
            objective: what is learned; called once, with the detector's parts for these images.

        Returns:
            The objective's scalars, named `loss...`.

        Raises:
            RuntimeError: the detector is in eval mode.
            ValueError: there is no image.
        """
        if not self.training:
            raise RuntimeError("losses need training mode (call train(), or detect() for boxes)")
        if not images:
            raise ValueError("0 images are not allowed (must be at least 1)")
        parts = self.parts(images)
        parts.user = getattr(objective, "__name__", type(objective).__name__)
        return objective(parts)

    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Detections of each image, by falling score.

        Runs in eval mode whatever the current mode is, without gradient. An image's detections do
        not depend on the other images, up to the rounding of batched arithmetic.
        """
        return self.inference(images).detections()

    def score_regions(
        self, images: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]
    ) -> list[ScoredRegions]:
        """Class probabilities and refined boxes of given boxes, (n, 4) for each image.

        As `detect`: in eval mode, without gradient, each image by itself.

        Raises:
            ConfigError: the detector lacks the ability "regions".
            ValueError: the numbers of images and of lists of boxes differ.
        """
        return self.inference(images).score_regions(boxes)

    def inference(
        self, images: Sequence[torch.Tensor], *, training_proposals: bool = False
    ) -> Inference:
        """The detector in eval mode at work on images, to be asked several times.

        Args:
            images: at least one.
            training_proposals: see `Parts`.
        """
        return Inference(self, images, training_proposals=training_proposals)

    @torch.no_grad()
    def dense_maps(self, images: Sequence[torch.Tensor]) -> DenseMaps:
        """Predictions at all locations, in eval mode, without gradient.

        The images are padded to one size as in `forward`, so that the locations are those of a
        student that sees images of the same sizes.

        Raises:
            ConfigError: the detector lacks the ability "dense".
        """
        with evaluating(self):
            return self.parts(images).dense_maps()

    def outside_state(self) -> dict[str, float]:
        """Numbers that losses depend on and that the state dict does not hold, by name."""
        return {}

    def load_outside_state(self, state: dict[str, float]) -> None:
        """Restore what `outside_state` returned."""
        if state:
            raise KeyError(f"{type(self).__name__} has no such state: {sorted(state)}")

    def load_weights(self, weights: str) -> None:
        """Fill the detector with MODEL.WEIGHTS, completely or not at all.

        Args:
            weights: "" keeps what there is; else a file of ours, or what its toolkit can read.

        Raises:
            WeightsError: the file is missing or damaged, or does not fit.
        """
        if weights:
            load_strictly(self, read_state(weights), weights)

    def export(self, path: Path, *, min_size: int, max_size: int, about: Mapping[str, Any]) -> str:
        """Write the weights for programs that do not have this package.

        Args:
            path: file to write; a second one may be written beside it.
            min_size: edge length in pixels to which those programs resize the shorter edge.
            max_size: bound on the longer edge.
            about: what else the file is to hold: "classes", names in label order, which the lines
                read, and "config".

        Returns:
            Python lines that load the file.

        Raises:
            UserError: there is no such form of it, or a file beside `path` is there already.
        """
        raise UserError(f"{self.name} cannot be exported (no other program loads it)")

    def warn_if_frozen(self) -> None:
        """Log a warning if parts cannot be trained; call it when they are random."""
        frozen = sum(not p.requires_grad for p in self.parameters())
        # Each toolkit has its own class of this name.
        norms = sum(
            any(kind.__name__ == "FrozenBatchNorm2d" for kind in type(part).__mro__)
            for part in self.modules()
        )
        if frozen or norms:
            logger.warning(
                "random weights, of which %d tensors and %d batch norms are frozen and stay random "
                "(set MODEL.WEIGHTS, or %s)",
                frozen,
                norms,
                self.thawing,
            )


class Inference:
    """A detector in eval mode at work on images, each of which passes the backbone once.

    Args:
        detector: may be trained in between; its features stay those of the first question.
        images: at least one.
        training_proposals: see `Parts`.
    """

    def __init__(
        self, detector: Detector, images: Sequence[torch.Tensor], *, training_proposals: bool
    ) -> None:
        self._detector = detector
        self._count = len(images)
        self._parts = []
        for indices in groups_of_equal_size(images, detector.size_divisor):
            with torch.no_grad(), evaluating(detector):  # parts may compute what they like at once
                parts = detector.parts([images[i] for i in indices])
            parts.training_proposals = training_proposals
            self._parts.append((indices, parts))

    def detections(self) -> list[Detections]:
        """As `Detector.detect`."""
        return self._ask(lambda parts, _: parts.detections())

    def score_regions(self, boxes: Sequence[torch.Tensor]) -> list[ScoredRegions]:
        """As `Detector.score_regions`."""
        if len(boxes) != self._count:
            raise ValueError(
                f"{self._count} images and {len(boxes)} lists of boxes are not allowed (must be "
                "equal)"
            )
        return self._ask(lambda parts, indices: parts.regions.score([boxes[i] for i in indices]))

    @torch.no_grad()
    def _ask(self, question: Callable[[Parts, list[int]], Sequence[_Answer]]) -> list[_Answer]:
        """The answers to a question, one for each image."""
        answers: dict[int, _Answer] = {}
        with evaluating(self._detector):
            for indices, parts in self._parts:
                answers.update(zip(indices, question(parts, indices), strict=True))
        return [answers[index] for index in range(self._count)]


def padded_size(images: Iterable[torch.Tensor], divisor: int) -> tuple[int, int]:
    """Height and width that hold every image, rounded up to multiples of a divisor."""
    heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
    return tuple(-(-max(sizes) // divisor) * divisor for sizes in (heights, widths))


def groups_of_equal_size(images: Sequence[torch.Tensor], divisor: int) -> list[list[int]]:
    """Numbers of the images that may share a batch.

    Padding changes what is found, because a padded border is no longer zero behind the first layer:
    only images of equal padded size are detected together.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(padded_size([image], divisor), []).append(index)
    return list(groups.values())
