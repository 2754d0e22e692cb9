"""From a configuration to the network of a run, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification.data.build import InputOptions
from ssod_imwa.classification.methods.build import METHODS
from ssod_imwa.classification.methods.mae import encoder_state, is_autoencoder
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import Settings, build_classifier
from ssod_imwa.classification.models.classifiers import (
    ClassifierOptions,
    CosineOptions,
    TauNormOptions,
    tau_normalized,
)
from ssod_imwa.classification.models.experts import Experts, ExpertsOptions
from ssod_imwa.classification.models.feature_head import FeatureHeadOptions
from ssod_imwa.classification.models.feature_tail import FeatureTail, FeatureTailOptions
from ssod_imwa.classification.models.freezing import StageOptions, reset_last_block
from ssod_imwa.classification.models.heads import ScaledClassifier, ScaleOptions
from ssod_imwa.classification.models.library_models import TIMM, LibraryClassifier
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.classification.models.vit import ViTOptions
from ssod_imwa.classification.models.weights import foreign_state, load_encoder
from ssod_imwa.classification.models.wide_resnet import WideResNetOptions
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.checkpoint.packages import (
    is_package,
    package_of,
    read_package,
    warn_of_pixels,
)
from ssod_imwa.errors import ConfigError, WeightsError, as_config_error

PREFIX = "deployed."


def check_weights(cfg: CfgNode) -> None:
    """Refuse initial weights that the method would not begin with.

    Raises:
        ConfigError: MODEL.WEIGHTS does not go with CLS.ALGORITHM or CLS.STAGE.
    """
    weights, stage = cfg.MODEL.WEIGHTS, cfg.CLS.get("STAGE")
    if weights and cfg.CLS.ALGORITHM == "mae":
        raise ConfigError(
            f"MODEL.WEIGHTS = {weights!r} is not allowed with CLS.ALGORITHM = 'mae' (must be "
            "'': pre-training draws its weights anew)"
        )
    if not weights and cfg.CLS.ALGORITHM == "cossl":
        raise ConfigError(
            "MODEL.WEIGHTS = '' is not allowed with CLS.ALGORITHM = 'cossl' (must be a run of "
            "FixMatch: CoSSL is its second stage)"
        )
    normalized = read_options(TauNormOptions, stage).tau_norm > 0
    if normalized and (weights in ("", "imagenet") or is_package(weights)):
        raise ConfigError(
            f"MODEL.WEIGHTS = {weights!r} is not allowed with CLS.STAGE.TAU_NORM (must be the "
            "run whose classifier is to be normalized)"
        )
    if normalized and read_options(StageOptions, stage).reset_classifier:
        raise ConfigError(
            "CLS.STAGE.RESET_CLASSIFIER = True is not allowed with CLS.STAGE.TAU_NORM (must be "
            "False: a new classifier has nothing to normalize)"
        )


def build_model(cfg: CfgNode, classes: int, *, weights: str) -> ImageClassifier | Experts:
    """The network of CLS.MODEL and CLS.STAGE.

    Args:
        cfg: of the run.
        classes: C.
        weights: as MODEL.WEIGHTS takes them.

    Raises:
        ConfigError: its description is wrong.
        WeightsError: the weights are missing or of another network.
    """
    node = cfg.CLS.get("STAGE")
    stage, tau = read_options(StageOptions, node), read_options(TauNormOptions, node).tau_norm
    imagenet = weights == "imagenet"
    with as_config_error("CLS.MODEL"):
        model = _build_network(cfg, classes, imagenet=imagenet)
        if is_package(weights):
            _load_package(cfg, model, weights)
        elif weights and not imagenet:
            has_classifier = load_weights(
                model, weights, keep_classifier=not stage.reset_classifier
            )
            if tau and not has_classifier:
                raise ConfigError(
                    f"MODEL.WEIGHTS = {weights!r} is not allowed with CLS.STAGE.TAU_NORM (must be "
                    "of a run: this file brings no classifier to normalize)"
                )
            if tau:
                normalize_classifier(model, tau)
        if stage.reset_last_block:
            reset_last_block(model)
        if read_options(ScaleOptions, node).learnable_scale:
            _scale_classifier(model)
    # Convolutions are faster with the channels of a pixel side by side, and hand that on.
    return model.to(memory_format=torch.channels_last)


def _load_package(cfg: CfgNode, model: ImageClassifier | Experts, weights: str) -> None:
    """Fill a network of timm, or its last stages, with a package's weights but the classifier's."""
    network = package_of(weights).network
    if isinstance(model, FeatureTail) and model.options.network == network:
        model.load_library_weights(read_package(weights), weights)
        return
    name = f"{TIMM}{network}"
    if not isinstance(model, LibraryClassifier) or model.library_name != name:
        raise WeightsError(f"{weights}: needs CLS.MODEL.NAME {name} and one expert")
    warn_of_pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, weights)
    model.load_library_weights(read_package(weights), weights)


def _build_network(cfg: CfgNode, classes: int, *, imagenet: bool) -> ImageClassifier | Experts:
    node = cfg.CLS.MODEL
    options = read_options(ExpertsOptions, node)
    settings = Settings(
        classes,
        image_size=read_options(InputOptions, cfg.CLS.INPUT).size,
        classifier=read_options(ClassifierOptions, node).classifier,
        scale=read_options(CosineOptions, node).scale,
        pretrained=imagenet,
        drop_path=read_options(ViTOptions, node).drop_path,
        wide_resnet=read_options(WideResNetOptions, node),
        feature_head=read_options(FeatureHeadOptions, node),
        feature_tail=read_options(FeatureTailOptions, node),
    )

    def build_one() -> ImageClassifier:
        return build_classifier(node.NAME, settings)

    # The heads of ECL and NCL stand on experts, even on one alone.
    if options.experts > 1 or METHODS[cfg.CLS.ALGORITHM].moco_weight:
        return Experts(build_one, options.experts, shared_groups=options.shared_groups)
    if options.shared_groups:
        raise ValueError(
            f"shared_groups = {options.shared_groups} is not allowed with experts = 1 (must be 0)"
        )
    return build_one()


def _scale_classifier(model: ImageClassifier | Experts) -> None:
    if isinstance(model, Experts):
        raise ValueError("learnable scales are not allowed with several experts (must be 1)")
    model.classifier = ScaledClassifier(model.classifier)


@torch.no_grad()
def normalize_classifier(model: nn.Module, tau: float) -> None:
    """Give a trained network the τ-normalized classifier, and a bias of 0 in place of its own.

    Raises:
        ConfigError: its classifier is not linear, or a class's weights are all 0.
    """
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise ConfigError(
            f"CLS.STAGE.TAU_NORM = {tau:g} is not allowed (must be 0 unless CLS.MODEL.CLASSIFIER "
            "is linear and CLS.MODEL.EXPERTS 1)"
        )
    with as_config_error(f"CLS.STAGE.TAU_NORM = {tau:g}"):
        classifier.weight.copy_(tau_normalized(classifier, tau).weight)
    classifier.bias.zero_()


def load_weights(
    model: ImageClassifier | Experts | MaskedAutoencoder,
    source: str,
    *,
    keep_classifier: bool = True,
) -> bool:
    """Fill a network with the one that a run trained, given its folder or a file of it.

    Args:
        model: the network.
        source: folder or file; or a file of another program with the network's state dict.
        keep_classifier: whether the classifier's weights are taken, too.

    Returns:
        Whether they were: a library's file and an autoencoder have no classifier of these classes.

    Raises:
        CheckpointError: the file is missing or damaged.
        WeightsError: it holds another network.
    """
    state = foreign_state(model, source)
    if state is None:
        state = deployed_state(read_models(source).weights)
    elif isinstance(model, LibraryClassifier) and not any(x.startswith("body.") for x in state):
        model.load_library_weights(state, source)  # by the library's own names
        return False
    if not isinstance(model, MaskedAutoencoder):
        if is_autoencoder(state):
            load_encoder(model, encoder_state(state), source=source)
            return False
        if not keep_classifier:
            load_encoder(model, state, source=source)
            return False
    try:
        model.load_state_dict(_folded(state, like=model))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} is of another network than CLS.MODEL: {first}") from error
    return True


def _folded(state: Mapping[str, Any], *, like: nn.Module) -> Mapping[str, Any]:
    """A scaled linear classifier's state as that of the linear one that it is equal to.

    So that a run can go on from a second stage, whose scales it does not have. A cosine classifier,
    without bias, is equal to no other with scales.
    """
    scale, bias = "classifier.scale", "classifier.classifier.bias"
    if scale in like.state_dict() or scale not in state or bias not in state:
        return state
    plain = {k: x for k, x in state.items() if not k.startswith("classifier.")}
    weight = state["classifier.classifier.weight"]
    plain["classifier.weight"] = state[scale][:, None] * weight
    plain["classifier.bias"] = state[scale] * state[bias]
    return plain


def deployed_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier's part of the weights of a method's network (`TrainingNetwork`)."""
    inner = {k.removeprefix(PREFIX): x for k, x in state.items() if k.startswith(PREFIX)}
    return inner or dict(state)


def number_of_classes(state: Mapping[str, Any]) -> int:
    """C of a classifier with these weights."""
    return next(len(x) for name, x in state.items() if name.endswith("classifier.weight"))
