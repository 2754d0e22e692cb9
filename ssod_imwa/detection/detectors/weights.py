"""Initial weights from torchvision, Caffe or an earlier run, checked name by name."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn
from torchvision.models import get_model_weights

from ssod_imwa.detection.detectors.caffe import read_caffe_resnet
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.errors import WeightsError

logger = logging.getLogger(__name__)

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
# Pixel statistics in RGB order that each family of backbones was trained with.
CAFFE_INPUT = ("BGR", (123.675, 116.28, 103.53), (1.0, 1.0, 1.0), True)
TORCHVISION_INPUT = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)


def load_weights(detector: TorchvisionFasterRCNN, weights: str) -> None:
    """Fill a detector with MODEL.WEIGHTS, completely or not at all.

    Args:
        detector: what `build_faster_rcnn` made.
        weights: one of

            - "": keep the random weights;
            - "imagenet": torchvision's ImageNet weights for the backbone (downloaded once);
            - FILE.pkl: Caffe's ResNet for the backbone (MSRA R-50.pkl, R-101.pkl);
            - any other file: a state dict written by `torch.save`, of a whole detector (ours,
              torchvision's, or inside one of our checkpoints: the model that the run recommends,
              else the teacher, else the student) or of a torchvision ResNet for the backbone.

    Raises:
        WeightsError: the file is missing, damaged, or its names and shapes are not the model's; or
            the backbone expects another input than the detector feeds it.
    """
    if weights == "":
        return
    if weights == "imagenet":
        _check_input(detector, TORCHVISION_INPUT, "torchvision's ImageNet weights")
        _load_backbone(detector, _download_imagenet(detector.depth), "imagenet")
    elif weights.endswith(".pkl"):
        _check_input(detector, CAFFE_INPUT, weights)
        _load_backbone(detector, read_caffe_resnet(Path(weights)), weights)
    else:
        state = read_state(weights)
        if "conv1.weight" in state:
            _check_input(detector, TORCHVISION_INPUT, weights)
            _load_backbone(detector, state, weights)
        else:
            _check_classes(detector, state, weights)
            load_strictly(detector, state, weights)


def read_state(weights: str) -> Mapping[str, Any]:
    """The state dict in a file, of the model that a run's checkpoint recommends.

    Raises:
        WeightsError: the file is missing or damaged, or holds none.
    """
    return _model_state(_read_torch_file(Path(weights)), weights)


def warn_if_frozen(detector: nn.Module) -> None:
    """Log a warning if parts of a detector cannot be trained; call it when they are random."""
    frozen = sum(not p.requires_grad for p in detector.parameters())
    # Each toolkit has its own class of this name.
    norms = sum(type(part).__name__ == "FrozenBatchNorm2d" for part in detector.modules())
    if frozen or norms:
        logger.warning(
            "random weights, of which %d tensors and %d batch norms are frozen and stay random "
            "(set MODEL.WEIGHTS, or MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN)",
            frozen,
            norms,
        )


def load_strictly(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Copy a state into a module if every name and shape fits, and change nothing otherwise.

    Batch norms' step counters do not count: frozen norms have none.

    Raises:
        WeightsError: up to ten missing names, unknown names and differing shapes each.
    """
    own, given = _without_counters(module.state_dict()), _without_counters(state)
    shapes = {
        name: f"{name} {_shape(given[name])} instead of {_shape(own[name])}"
        for name in own.keys() & given.keys()
        if _shape(given[name]) != _shape(own[name])
    }
    problems = [
        _listed("missing", own.keys() - given.keys()),
        _listed("unknown", given.keys() - own.keys()),
        _listed("of another shape", shapes.values()),
    ]
    if any(problems):
        raise WeightsError(f"{source}: does not fit: {'; '.join(filter(None, problems))}")
    module.load_state_dict(state, strict=False)


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _listed(what: str, names: Sequence[str] | set[str]) -> str:
    more = f", ... ({len(names) - 10} more)" if len(names) > 10 else ""
    return f"{len(names)} {what}: {', '.join(sorted(names)[:10])}{more}" if names else ""


def _check_input(
    detector: TorchvisionFasterRCNN,
    expected: tuple[str, Sequence[float], Sequence[float], bool],
    source: str,
) -> None:
    """Refuse what would load but never work: colors or strides of the other family."""
    image_format, mean, std, stride_in_1x1 = expected
    order = 1 if image_format == "RGB" else -1
    wanted = torch.tensor([mean[::order], std[::order]])
    given = torch.stack([detector.pixel_mean, detector.pixel_std]).flatten(1).cpu()
    fits = (
        detector.image_format == image_format
        and (detector.stride_in_1x1 == stride_in_1x1 or detector.depth == 18)
        and torch.allclose(given, wanted, rtol=0.005)
    )
    if not fits:
        raise WeightsError(
            f"{source}: the model feeds them other pixels or strides than they were trained with "
            f"(set INPUT.FORMAT {image_format}, MODEL.PIXEL_MEAN {list(mean[::order])}, "
            f"MODEL.PIXEL_STD {list(std[::order])}, MODEL.RESNETS.STRIDE_IN_1X1 {stride_in_1x1})"
        )


def _check_classes(detector: TorchvisionFasterRCNN, state: Mapping[str, Any], source: str) -> None:
    given = state.get(CLASSIFIER)
    if isinstance(given, torch.Tensor) and given.shape[:1] != (detector.num_classes + 1,):
        raise WeightsError(
            f"{source}: was trained on {len(given) - 1} classes, the model has "
            f"{detector.num_classes} (train on the same classes, or set MODEL.WEIGHTS to backbone "
            "weights such as imagenet)"
        )


def _load_backbone(detector: TorchvisionFasterRCNN, state: Mapping[str, Any], source: str) -> None:
    body = {name: x for name, x in state.items() if not name.startswith("fc.")}
    load_strictly(detector.backbone.body, body, source)


def _download_imagenet(depth: int) -> dict[str, torch.Tensor]:
    choice = get_model_weights(f"resnet{depth}").IMAGENET1K_V1
    try:
        return choice.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"MODEL.WEIGHTS imagenet: {choice.url} cannot be fetched ({error}); download it "
            f"elsewhere and put it into {folder}"
        ) from error


def _read_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"MODEL.WEIGHTS = {path}: there is no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except (
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        # torch's own text advises to load with weights_only=False, which would run the file's code.
        raise WeightsError(
            f"{path}: is not a file of weights (must be a dict of tensors, written whole by "
            "torch.save)"
        ) from error


def _model_state(content: Any, source: str) -> Mapping[str, Any]:
    """The state dict inside a checkpoint: of the model that the run recommends, if it says so."""
    recommended = content.get("inference_model") if isinstance(content, Mapping) else None
    for key in (recommended, "trainer", "models", "model", "teacher", "student"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return _model_state(content[key], source)
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source}: holds no state dict but a {type(content).__name__}")
    return content
