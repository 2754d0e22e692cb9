"""A trained classifier as one plain state dict, and the lines that load it."""

from __future__ import annotations

from typing import Any, TypeGuard

from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification import build, networks
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier, ScaleOptions
from ssod_imwa.classification.models.torchvision_models import TorchvisionResNet
from ssod_imwa.classification.models.weights import exported_state
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.checkpoint.models import ModelFile


def trained_classifier(cfg: CfgNode, file: ModelFile) -> nn.Module:
    """The classifier of a run in eval mode on the CPU, without what only its training needed.

    Args:
        cfg: of the run.
        file: what it wrote.

    Raises:
        WeightsError: the weights are not those of the run's configuration.
    """
    model = networks.build_model(cfg, _number_of_classes(file), weights="")
    networks.load_weights(model, str(file.path))
    if isinstance(model, Experts) and model.num_experts == 1:
        model = model.experts[0]  # a whole classifier
    return model.eval()


def _number_of_classes(file: ModelFile) -> int:
    """C, by the weights themselves or, where they have a library's names, by the classes'."""
    if len(file.models) == 1 and "model" in file.models:  # what `exported_content` is
        return len(file.classes)
    return networks.number_of_classes(networks.deployed_state(file.weights))


def exported_content(model: nn.Module, cfg: CfgNode, file: ModelFile) -> dict[str, Any]:
    """What is written of a classifier.

    Args:
        model: the classifier.
        cfg: of its run.
        file: what its run wrote.

    Returns:
        "model", its weights as copies on the CPU, under the names of the network's library if it
        has one; "classes"; "input" with "size", the edge of images in pixels, "mean" and "std"; and
        "config" and "stored_size", the run's, where its file has the last.
    """
    state = exported_state(model) if _is_of_library(model) else model.state_dict()
    mean, std = (list(values) for values in build.statistics(cfg))
    of_file = {key: file.content[key] for key in ("stored_size",) if key in file.content}
    return {
        "model": {name: x.detach().cpu().clone() for name, x in state.items()},
        "classes": list(file.classes),
        "input": {"size": cfg.CLS.INPUT.SIZE, "mean": mean, "std": std},
        "config": cfg.dump(),
        **of_file,
    }


def loading_code(model: nn.Module, cfg: CfgNode, path: str) -> str:
    """Python lines that make `model` with the weights at `path`.

    torchvision's ResNets need nothing of this package.

    Args:
        model: the exported classifier.
        cfg: of its run.
        path: where the weights were written.
    """
    classes = networks.number_of_classes(model.state_dict())
    lines = ["import torch"]
    if _is_of_library(model):
        name = cfg.CLS.MODEL.NAME
        lines += [
            f"from torchvision.models import {name}",
            f"model = {name}(num_classes={classes})",
        ]
    else:
        lines += [
            "from ssod_imwa.classification.networks import build_model",
            "from ssod_imwa.runs.config import load_config",
            f"cfg = load_config(overrides={_overrides(cfg)})",
            f"model = build_model(cfg, {classes}, weights='')",
        ]
    lines += [
        f"content = torch.load({path!r}, weights_only=True)",
        "model.load_state_dict(content['model'])",
        "model.eval()",
        "classes = content['classes']  # of labels 0, 1, ...",
        "# Images: RGB, values 0..1, size x size pixels, minus mean, divided by std.",
        "size, mean, std = (content['input'][key] for key in ('size', 'mean', 'std'))",
    ]
    return "\n".join(lines) + "\n"


def _is_of_library(model: nn.Module) -> TypeGuard[TorchvisionResNet]:
    """Whether torchvision builds the whole network by its name."""
    if not isinstance(model, TorchvisionResNet) or not hasattr(model.stem, "maxpool"):
        return False
    classifier = model.classifier
    if isinstance(classifier, ScaledClassifier):  # exported as the linear one it is equal to
        classifier = classifier.classifier
    return isinstance(classifier, nn.Linear)


def _overrides(cfg: CfgNode) -> list[str]:
    """What describes the network."""
    settings = {"TASK": cfg.TASK}
    settings |= {f"CLS.MODEL.{key}": value for key, value in cfg.CLS.MODEL.items()}
    settings["CLS.INPUT.SIZE"] = cfg.CLS.INPUT.SIZE
    scaled = read_options(ScaleOptions, cfg.CLS.get("STAGE")).learnable_scale
    settings |= {"CLS.STAGE.LEARNABLE_SCALE": True} if scaled else {}
    return [str(x) for pair in settings.items() for x in pair]
