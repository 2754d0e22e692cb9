"""Initial weights from torchvision, Caffe or an earlier run, checked name by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision.models import get_model_weights

from ssod_imwa.detection.detectors.options import TIMM, DetectorOptions
from ssod_imwa.engine.checkpoint.foreign import check_related, plain_state, read_content
from ssod_imwa.engine.checkpoint.packages import package_of, warn_of_pixels
from ssod_imwa.errors import WeightsError


@dataclass(frozen=True)
class BackboneInput:
    """What a family of ImageNet backbones was trained with; statistics of red, green and blue."""

    image_format: str
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    stride_in_1x1: bool


CAFFE_INPUT = BackboneInput("BGR", (123.675, 116.28, 103.53), (1.0, 1.0, 1.0), True)
TORCHVISION_INPUT = BackboneInput("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)


def read_state(weights: str) -> Mapping[str, Any]:
    """The state dict in a file, as `state_in` finds it.

    Raises:
        WeightsError: the file is missing or damaged, or holds none.
    """
    return state_in(read_content(Path(weights)), weights)


def state_in(content: Any, source: str) -> Mapping[str, Any]:
    """The state dict in what a file holds, of the model that a run's checkpoint recommends.

    What wrappers and trainers of other programs put around it is taken away.

    Args:
        content: of the file.
        source: for messages.

    Raises:
        WeightsError: there is none, or several.
    """
    return plain_state(_model_of_run(content), source)


def load_strictly(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Copy a state into a module if every name and shape fits, and change nothing otherwise.

    Batch norms' step counters do not count: frozen norms have none.

    Raises:
        WeightsError: up to ten missing names, unknown names and differing shapes each.
    """
    ours, theirs = _without_counters(module.state_dict()), _without_counters(state)
    shapes = {
        name: f"{name} {_shape(theirs[name])} instead of {_shape(ours[name])}"
        for name in ours.keys() & theirs.keys()
        if _shape(theirs[name]) != _shape(ours[name])
    }
    check_related(theirs, ours, source)
    problems = [
        _listed("missing", ours.keys() - theirs.keys()),
        _listed("unknown", theirs.keys() - ours.keys()),
        _listed("of another shape", shapes.values()),
    ]
    if any(problems):
        raise WeightsError(f"{source}: does not fit: {'; '.join(filter(None, problems))}")
    module.load_state_dict(state, strict=False)


def check_input(options: DetectorOptions, expected: BackboneInput, source: str) -> None:
    """Refuse what would load but never work: colors or strides of the other family.

    Raises:
        WeightsError: a detector of these options feeds its backbone something else.
    """
    pixels, resnets = options.pixels, options.resnets
    order = 1 if expected.image_format == "RGB" else -1
    mean, std = list(expected.pixel_mean[::order]), list(expected.pixel_std[::order])
    statistics = torch.tensor([pixels.pixel_mean, pixels.pixel_std])
    fits = (
        options.image.format == expected.image_format
        and (resnets.stride_in_1x1 == expected.stride_in_1x1 or resnets.depth == 18)
        and torch.allclose(statistics, torch.tensor([mean, std]), rtol=0.005)
    )
    if not fits:
        raise WeightsError(
            f"{source}: the model feeds them other pixels or strides than they were trained with "
            f"(set INPUT.FORMAT {expected.image_format}, MODEL.PIXEL_MEAN {mean}, "
            f"MODEL.PIXEL_STD {std}, MODEL.RESNETS.STRIDE_IN_1X1 {expected.stride_in_1x1})"
        )


def check_classes(
    state: Mapping[str, Any],
    name: str,
    num_classes: int,
    source: str,
    *,
    rows: int,
    background_rows: int,
) -> None:
    """Explain a classifier of other classes, whose shape alone would say little.

    Args:
        state: of a whole detector.
        name: of the classifier's weights, which have equally many rows for each class.
        num_classes: of the detector that is to be filled.
        source: where the state comes from.
        rows: of the detector's own classifier.
        background_rows: how many of these are for background.

    Raises:
        WeightsError: the numbers of classes differ.
    """
    weights = state.get(name)
    if isinstance(weights, torch.Tensor) and weights.shape[:1] != (rows,):
        per_class = (rows - background_rows) // num_classes
        classes = (len(weights) - background_rows) // per_class
        raise WeightsError(
            f"{source}: was trained on {classes} classes, the model has {num_classes} "
            "(train on the same classes, or set MODEL.WEIGHTS to backbone weights such as imagenet)"
        )


def check_package(options: DetectorOptions, weights: str) -> None:
    """Refuse another network or order of colors than a package's, and warn of other statistics.

    Args:
        options: of a detector on a network of timm.
        weights: "package:NAME".

    Raises:
        WeightsError: the network or INPUT.FORMAT is another.
    """
    network = package_of(weights).network
    if options.backbone.name != f"{TIMM}{network}":
        raise WeightsError(
            f"{weights}: needs MODEL.BACKBONE.NAME {TIMM}{network}, not {options.backbone.name}"
        )
    if options.image.format != "RGB":
        raise WeightsError(f"{weights}: needs INPUT.FORMAT RGB, not {options.image.format}")
    warn_of_pixels(options.pixels.pixel_mean, options.pixels.pixel_std, weights)


def load_part(body: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Fill a network with a larger one's weights, of which the rest is its last layers.

    Raises:
        WeightsError: as `load_strictly`.
    """
    ours = body.state_dict()
    # As a body, timm names a part of a sequence "stages_0", not "stages.0".
    names = {name.replace(".", "_"): name for name in ours}
    renamed = {names.get(name.replace(".", "_"), name): x for name, x in state.items()}
    heads = {name.partition(".")[0] for name in renamed} - {x.partition(".")[0] for x in ours}
    features = {n: x for n, x in renamed.items() if n.partition(".")[0] not in heads}
    check_related(renamed, ours, source)
    load_strictly(body, features, source)


def load_resnet(body: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Fill a backbone with a ResNet's weights, without its classifier and stages it does not have.

    Raises:
        WeightsError: as `load_strictly`.
    """
    stages = {name for name, _ in body.named_children()}
    unused = {"fc", "layer2", "layer3", "layer4"} - stages
    features = {name: x for name, x in state.items() if name.partition(".")[0] not in unused}
    load_strictly(body, features, source)


def download_imagenet(depth: int) -> dict[str, torch.Tensor]:
    """The weights of torchvision's ResNet, downloaded once.

    Raises:
        WeightsError: they cannot be fetched.
    """
    choice = get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return choice.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"MODEL.WEIGHTS imagenet: {choice.url} cannot be fetched ({error}); download it "
            f"elsewhere and put it into {folder}"
        ) from error


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _listed(what: str, names: Collection[str]) -> str:
    more = f", ... ({len(names) - 10} more)" if len(names) > 10 else ""
    return f"{len(names)} {what}: {', '.join(sorted(names)[:10])}{more}" if names else ""


def _model_of_run(content: Any) -> Any:
    """What a file of ours holds of the model that its run recommends; other files as they are."""
    if not isinstance(content, Mapping):
        return content
    names = [content.get("inference_model"), "trainer", "models"]
    names += [] if "model" in content else ["teacher", "student"]
    for name in names:
        if isinstance(content.get(name), Mapping):
            return _model_of_run(content[name])
    return content
