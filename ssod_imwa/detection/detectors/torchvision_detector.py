"""What detectors made of torchvision's parts share: pixels, padding, initial weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.image_list import ImageList

from ssod_imwa.detection.detectors.backbones import Backbone
from ssod_imwa.detection.detectors.base import Detector, padded_size
from ssod_imwa.detection.detectors.caffe import read_caffe_resnet
from ssod_imwa.detection.detectors.export import exported_state, write_exported
from ssod_imwa.detection.detectors.options import TIMM, DetectorOptions
from ssod_imwa.detection.detectors.weights import (
    CAFFE_INPUT,
    TORCHVISION_INPUT,
    check_classes,
    check_input,
    check_package,
    download_imagenet,
    load_part,
    load_resnet,
    load_strictly,
    state_in,
)
from ssod_imwa.engine.checkpoint.foreign import read_content
from ssod_imwa.engine.checkpoint.packages import is_package, package_of, read_package
from ssod_imwa.errors import WeightsError

# Keys of exported files: the channel order that the model takes, and our tensors that torchvision's
# model does not have.
CHANNEL_ORDER = "channel_order"
LEFT_OUT = "left_out"


class TorchvisionDetector(Detector):
    """A detector on a backbone with a feature pyramid.

    Args:
        backbone: see there.
        options: what the detector was made with.
        num_classes: C.

    Attributes:
        classifier: name of the weights that have rows for each class.
        background_rows: how many of these rows are for background.
    """

    classifier: str
    background_rows: int = 0
    options: DetectorOptions
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, backbone: Backbone, options: DetectorOptions, *, num_classes: int) -> None:
        super().__init__(num_classes)
        self.backbone = backbone
        self.size_divisor = backbone.stride
        if options.backbone.name != "resnet":
            self.thawing = "MODEL.BACKBONE.FREEZE_AT 0 MODEL.BACKBONE.NORM BN"
        self.options = options
        # Not persistent: torchvision's state dicts have no such keys.
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(getattr(options.pixels, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def load_weights(self, weights: str) -> None:
        """Fill the detector with MODEL.WEIGHTS, completely or not at all.

        Args:
            weights: one of

                - "": keep the random weights;
                - "imagenet": torchvision's ImageNet weights for the backbone (downloaded once);
                - "package:NAME": an installed package's, see `engine.checkpoint.packages`;
                - FILE.pkl: Caffe's ResNet for the backbone (MSRA R-50.pkl, R-101.pkl);
                - any other file: a state dict written by `torch.save`, of a whole detector (ours,
                  torchvision's, or inside one of our checkpoints: the model that the run
                  recommends, else the teacher, else the student) or, for the backbone, of a
                  ResNet of torchvision or of the network of timm that it is.

        Raises:
            WeightsError: the file is missing, damaged, or its names and shapes are not the model's;
                or what it holds expects another input than the detector feeds it.
        """
        if weights == "":
            return
        body = self.backbone.body
        if self.options.backbone.name != "resnet":
            self._load_timm(weights)
        elif is_package(weights):
            network = package_of(weights).network
            raise WeightsError(f"{weights}: needs MODEL.BACKBONE.NAME {TIMM}{network}, not resnet")
        elif weights == "imagenet":
            check_input(self.options, TORCHVISION_INPUT, "torchvision's ImageNet weights")
            load_resnet(body, download_imagenet(self.options.resnets.depth), weights)
        elif weights.endswith(".pkl"):
            check_input(self.options, CAFFE_INPUT, weights)
            load_resnet(body, read_caffe_resnet(Path(weights)), weights)
        elif "conv1.weight" in (state := self._read_state(weights)):
            check_input(self.options, TORCHVISION_INPUT, weights)
            load_resnet(body, state, weights)
        else:
            self._load_all(state, weights)

    def _load_timm(self, weights: str) -> None:
        """A package's weights for a body of timm, or a file of timm's or of a whole detector."""
        body, name = self.backbone.body, self.options.backbone.name.removeprefix(TIMM)
        if is_package(weights):
            check_package(self.options, weights)
            load_part(body, read_package(weights), weights)
            return
        if weights == "imagenet" or weights.endswith(".pkl"):
            raise WeightsError(
                f"MODEL.WEIGHTS = {weights!r} is not allowed with MODEL.BACKBONE.NAME = "
                f"'{TIMM}{name}' (must be package:NAME, or a file of a detector's or of timm's "
                "weights)"
            )
        state = self._read_state(weights)
        if any(x.startswith("backbone.") for x in state):
            self._load_all(state, weights)
        else:
            load_part(body, state, weights)

    def _read_state(self, weights: str) -> Mapping[str, Any]:
        """The state dict in a file; one that `write_state` wrote must fit INPUT.FORMAT."""
        content, order = read_content(Path(weights)), self.options.image.format
        state = state_in(content, weights)
        if not {CHANNEL_ORDER, LEFT_OUT} <= content.keys():
            return state
        if (written := content[CHANNEL_ORDER]) != order:
            raise WeightsError(
                f"{weights}: is an export, which takes {written} images, not {order} (set "
                f"INPUT.FORMAT {written}, and turn MODEL.PIXEL_MEAN and MODEL.PIXEL_STD around; or "
                "name the run's own file)"
            )
        return {**state, **content[LEFT_OUT]}

    def _load_all(self, state: Mapping[str, Any], source: str) -> None:
        check_classes(
            state,
            self.classifier,
            self.num_classes,
            source,
            rows=len(self.get_parameter(self.classifier)),
            background_rows=self.background_rows,
        )
        load_strictly(self, state, source)

    def write_state(
        self,
        path: Path,
        *,
        min_size: int,
        max_size: int,
        about: Mapping[str, Any],
        without: Collection[str] = (),
    ) -> None:
        """Write the state dict that plain torchvision loads, whose models take RGB.

        What it cannot load is written beside it, for `load_weights`.

        Args:
            path: see `Detector.export`.
            min_size: see there.
            max_size: see there.
            about: see there.
            without: names of tensors that torchvision's model does not have.
        """
        swap = self.options.image.format == "BGR"
        state = exported_state(self.state_dict(), swap_input=swap)
        left_out = {name: state.pop(name) for name in without}
        about = {**about, CHANNEL_ORDER: "RGB", LEFT_OUT: left_out}
        write_exported(path, state, min_size=min_size, max_size=max_size, about=about)

    def batch(self, images: Sequence[torch.Tensor]) -> ImageList:
        """Normalize and pad with zeros, the mean color, at the right and at the bottom."""
        size = padded_size(images, self.size_divisor)
        batch = self.pixel_mean.new_zeros(len(images), 3, *size)
        for row, image in zip(batch, images, strict=True):
            pixels = image if self.options.image.format == "RGB" else image.flip(0)
            height, width = image.shape[-2:]
            row[:, :height, :width] = (pixels - self.pixel_mean) / self.pixel_std
        return ImageList(batch, [tuple(image.shape[-2:]) for image in images])


def check_options(options: DetectorOptions, num_classes: int) -> None:
    """Raise ValueError where lists of all detectors' options have a wrong length."""
    check_lengths(
        {
            "pixel_mean": (options.pixels.pixel_mean, 3),
            "pixel_std": (options.pixels.pixel_std, 3),
        }
    )
    if num_classes < 1:
        raise ValueError(f"num_classes = {num_classes} is not allowed (must be at least 1)")


def check_lengths(lists: dict[str, tuple[Sequence[object], int]]) -> None:
    """Raise ValueError for the first of some lists, by name, that has not as many values."""
    for name, (values, count) in lists.items():
        if len(values) != count:
            raise ValueError(f"{name} = {values} is not allowed (must have {count} values)")
