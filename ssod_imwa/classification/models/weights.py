"""Weights of image classifiers: started from, and named as torchvision and timm name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.engine.checkpoint.atomic import damage, digest_path
from ssod_imwa.engine.checkpoint.foreign import check_related, plain_state, read_content
from ssod_imwa.errors import WeightsError

POSITIONS = "stem.pos_embed"
CLASSIFIER = "classifier."
OF_CLASSIFIER = re.compile(r"(experts\.\d+\.)?classifier\.")  # each expert has its own
# Steps of batch norms: state dicts of old files lack them.
COUNTER = "num_batches_tracked"


def load_encoder(
    model: ImageClassifier | Experts, state: Mapping[str, torch.Tensor], *, source: str
) -> None:
    """Copy all weights but the classifier's, every one or none.

    A vision transformer's position embeddings are resized bicubically if the state's are those of
    another image size.

    Args:
        model: changed in place; of experts, each.
        state: weights by the model's names; classifiers among them are left out.
        source: where they come from, for the message.

    Raises:
        WeightsError: names or shapes differ, with up to ten of each.

    Example:
        >>> from ssod_imwa.classification.models.cifar_resnet import CifarResNet
        >>> trained, model = CifarResNet(100, depth=8), CifarResNet(10, depth=8)
        >>> load_encoder(model, trained.state_dict(), source="CIFAR-100")
        >>> model.stem[0].weight.equal(trained.stem[0].weight)
        True
    """
    wanted = {name: x for name, x in model.state_dict().items() if not OF_CLASSIFIER.match(name)}
    encoder = {name: x for name, x in state.items() if not OF_CLASSIFIER.match(name)}
    if POSITIONS in wanted and POSITIONS in encoder:
        encoder[POSITIONS] = resized_positions(encoder[POSITIONS], wanted[POSITIONS])
    check_related(encoder, wanted, source)
    problems = [
        _listed("missing", (n for n in wanted.keys() - encoder.keys() if not n.endswith(COUNTER))),
        _listed("unknown", encoder.keys() - wanted.keys()),
        _listed(
            "of another shape",
            (
                f"{n} {tuple(encoder[n].shape)} instead of {tuple(wanted[n].shape)}"
                for n in wanted.keys() & encoder.keys()
                if encoder[n].shape != wanted[n].shape
            ),
        ),
    ]
    if any(problems):
        raise WeightsError(f"{source}: does not fit: {'; '.join(filter(None, problems))}")
    model.load_state_dict(encoder, strict=False)


def foreign_state(model: nn.Module, source: str) -> dict[str, torch.Tensor] | None:
    """The state in a file of another program under the model's names, or None for a run's file.

    What wrappers and trainers put around it is taken away; the names may be those of torchvision
    or timm.

    Raises:
        WeightsError: the file holds something else, or several models.
    """
    path = Path(source)
    if not path.is_file() or (digest_path(path).is_file() and damage(path) is not None):
        return None  # whoever reads runs says what is wrong
    content = read_content(path)
    if isinstance(content, Mapping) and {"inference_model", "iteration"} & content.keys():
        return None  # of a run
    state = plain_state(content, source)
    return renamed_from_library(model, state) if isinstance(model, ImageClassifier) else state


def resized_positions(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Position embeddings (1, 1 + n, d) of a square of patches, resized to (1, 1 + m, d).

    The first, the class token's, is kept. Those that cannot be resized are returned as they are.
    """
    sides = [round((x.shape[1] - 1) ** 0.5) for x in (positions, like)]
    square = all(s * s == x.shape[1] - 1 for s, x in zip(sides, (positions, like), strict=True))
    if not square or positions.shape[1] == like.shape[1]:
        return positions
    # antialias=False: as the authors of MAE and LiVT resize.
    return resample_abs_pos_embed(
        positions, [sides[1]] * 2, [sides[0]] * 2, num_prefix_tokens=1, antialias=False
    )


def exported_state(model: ImageClassifier) -> dict[str, torch.Tensor]:
    """The state under the names of the library that the network comes from, which can load it.

    A scaled linear classifier is exported as the linear one that it is equal to.

    Args:
        model: of torchvision's or timm's layers; others keep their own names.

    Raises:
        ValueError: the classifier is no linear one, and the library has no other.

    Example:
        >>> from torchvision.models import resnet18
        >>> from ssod_imwa.classification.models.torchvision_models import TorchvisionResNet
        >>> state = exported_state(TorchvisionResNet("resnet18", 10))
        >>> resnet18(num_classes=10).load_state_dict(state)
        <All keys matched successfully>
    """
    state = {n: x for n, x in model.state_dict().items() if not n.startswith(CLASSIFIER)}
    linear = model.classifier
    if isinstance(linear, ScaledClassifier):
        linear = linear.folded()
    if model.library_names and not isinstance(linear, nn.Linear):
        raise ValueError(
            f"a {type(linear).__name__} cannot be exported (the library's classifier is linear)"
        )
    state.update(linear.state_dict(prefix=CLASSIFIER))
    return {_library_name(model, name): tensor for name, tensor in state.items()}


def renamed_from_library(
    model: ImageClassifier, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state with the names of torchvision or timm, under the model's names.

    Args:
        model: gives the names.
        state: weights by the library's names; names that the model does not know are kept.
    """
    names = {_library_name(model, name): name for name in model.state_dict()}
    return {names.get(name, name): tensor for name, tensor in state.items()}


def _library_name(model: ImageClassifier, name: str) -> str:
    for prefix, library in model.library_names.items():
        if name.startswith(prefix):
            return library + name.removeprefix(prefix)
    return name


def _listed(what: str, names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f", ... ({len(listed) - 10} more)" if len(listed) > 10 else ""
    return f"{len(listed)} {what}: {', '.join(listed[:10])}{more}" if listed else ""
