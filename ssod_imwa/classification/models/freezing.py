"""Which part of a classifier is trained, and what its frozen part still does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssod_imwa.classification.checks import check_choice
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.classification.models.library_models import LibraryClassifier
from ssod_imwa.config.options import Options, option

TrainedPart = Literal[
    "all",
    "backbone",
    "classifier",
    "last_block",
    "last_block_and_norms",
    "last_block_only",
    "scale",
]
PARTS = get_args(TrainedPart)
MovingNorms = Literal["none", "last_block", "all"]
# Those beside which batch norms stand still unless they are let move.
WITH_FROZEN_NORMS: tuple[TrainedPart, ...] = (
    "classifier",
    "last_block",
    "last_block_only",
    "scale",
)


@dataclass(frozen=True)
class StageOptions(Options):
    """What a stage of training trains, and what it starts anew."""

    part: TrainedPart = option(
        "all",
        "what is trained; the last block is Places-LT's (with all batch norms: PaCo's), the scale "
        "LWS's",
    )
    reset_classifier: bool = option(False, "start the classifier anew (cRT)")
    reset_last_block: bool = option(False, "start the last block anew (Places-LT)")
    classifier_lr: float = option(
        1.0, "factor of SOLVER.BASE_LR for the classifier's weights", low=0
    )


def train_only(model: ImageClassifier | Experts, part: TrainedPart) -> None:
    """Let gradients change one part of a classifier, and set the modes of `set_train_mode`.

    Call it before the optimizer and DistributedDataParallel are made, which look at
    `requires_grad` once.

    Args:
        model: changed in place; of experts, each.
        part: what is trained:

            - "all";
            - "backbone": all but the classifier;
            - "classifier": nothing else (cRT, MiSLAS' second stage);
            - "last_block": the last block of the last group, what follows the groups, and the
              classifier, as on Places-LT with ImageNet's ResNet-152;
            - "last_block_and_norms": that and every batch norm, whose statistics are the batch's,
              as PaCo and GPaCo have it on Places-LT;
            - "last_block_only": that without the classifier;
            - "scale": the scales of a `ScaledClassifier` (LWS).

    Raises:
        ValueError: the part is not known, or the model has no scales or no blocks.

    Example:
        >>> from ssod_imwa.classification.models.cifar_resnet import CifarResNet
        >>> model = CifarResNet(10, depth=8)
        >>> train_only(model, "classifier")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['classifier.weight', 'classifier.bias']
    """
    frozen = _frozen(model, part)
    model.requires_grad_(True)
    for module in frozen:
        module.requires_grad_(False)
    if part == "last_block_and_norms":
        for layer in _batch_norms(frozen):
            layer.requires_grad_(True)
    for classifier in _classifiers(model):
        for unused in classifier.unused:
            unused.requires_grad_(False)
    set_train_mode(model, part)


def set_train_mode(
    model: ImageClassifier | Experts, part: TrainedPart, *, move_statistics: MovingNorms = "none"
) -> None:
    """`model.train()`, but the part that is not trained stays in eval mode.

    Args:
        model: changed in place.
        part: as in `train_only`.
        move_statistics: which of the frozen part's batch norms normalize by the batch and move
            their running statistics, as in training: MiSLAS' shifted batch norm, "all" or, on
            Places-LT, those of the last block of the last group. Dropout stays off.

    Raises:
        ValueError: as in `train_only`.
    """
    frozen = _frozen(model, part)
    model.train()
    for module in frozen:
        module.eval()
    moving = frozen if part == "last_block_and_norms" else []
    if move_statistics == "all":
        moving = frozen
    elif move_statistics == "last_block":
        for classifier in _classifiers(model):
            _check_blocks(classifier, "move_statistics = 'last_block'", "'none' or 'all'")
            moving.append(_blocks(classifier.groups[-1])[-1])
    for layer in _batch_norms(moving):
        layer.train()


def reset_last_block(model: ImageClassifier | Experts) -> None:
    """Draw the weights of each last block anew, statistics included, as on Places-LT.

    Raises:
        ValueError: the model has no blocks.
    """
    for classifier in _classifiers(model):
        _check_blocks(classifier, "reset_last_block = True", "False")
        classifier.redraw(_blocks(classifier.groups[-1])[-1])


def _classifiers(model: ImageClassifier | Experts) -> list[ImageClassifier]:
    return list(model.experts) if isinstance(model, Experts) else [model]


def _frozen(model: ImageClassifier | Experts, part: TrainedPart) -> list[nn.Module]:
    check_choice("part", part, PARTS)
    if isinstance(model, Experts):
        return [module for expert in _classifiers(model) for module in _frozen(expert, part)]
    if part == "all":
        return []
    if part == "backbone":
        return [model.classifier]
    if part == "classifier":
        return _encoder(model)
    if part == "scale":
        if not isinstance(model.classifier, ScaledClassifier):
            raise ValueError(
                f"part = 'scale' is not allowed with a {type(model.classifier).__name__} "
                "(must be a ScaledClassifier)"
            )
        return [*_encoder(model), model.classifier.classifier]
    _check_blocks(model, f"part = {part!r}", "'all', 'backbone', 'classifier' or 'scale'")
    *earlier, last = model.groups
    frozen = [*earlier, *_blocks(last)[:-1]]
    return [*frozen, model.classifier] if part == "last_block_only" else frozen


def _check_blocks(model: ImageClassifier, setting: str, allowed: str) -> None:
    # Its only group would be taken for the last block: all but the classifier.
    if isinstance(model, LibraryClassifier):
        raise ValueError(
            f"{setting} is not allowed with {model.library_name}, which is one piece without "
            f"blocks (must be {allowed})"
        )


def _batch_norms(modules: Iterable[nn.Module]) -> Iterator[_BatchNorm]:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                yield layer


def _encoder(model: ImageClassifier) -> list[nn.Module]:
    return [child for child in model.children() if child is not model.classifier]


def _blocks(group: nn.Module) -> list[nn.Module]:
    return list(group) if isinstance(group, nn.Sequential) else [group]
