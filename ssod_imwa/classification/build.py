"""From a configuration to the parts of a classification run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification.data.augmentation import Statistics
from ssod_imwa.classification.data.build import ClassificationData, InputOptions
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import FeatureDataset, feature_view
from ssod_imwa.classification.data.large_views import large_view
from ssod_imwa.classification.data.samplers import SAMPLERS, SUBSET, class_sampler
from ssod_imwa.classification.data.small_views import CutoutOptions, PaddingOptions, small_view
from ssod_imwa.classification.data.subsets import SubsetOptions, member_positions
from ssod_imwa.classification.methods.build import METHODS
from ssod_imwa.classification.methods.mae import encoder_state, is_autoencoder
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import ON_FEATURES, build_classifier
from ssod_imwa.classification.models.classifiers import (
    ClassifierOptions,
    CosineOptions,
    TauNormOptions,
    tau_normalized,
)
from ssod_imwa.classification.models.experts import Experts, ExpertsOptions
from ssod_imwa.classification.models.feature_head import NAME as FEATURE_HEAD
from ssod_imwa.classification.models.feature_head import FeatureHeadOptions
from ssod_imwa.classification.models.feature_tail import NAME as FEATURE_TAIL
from ssod_imwa.classification.models.feature_tail import FeatureTail, FeatureTailOptions
from ssod_imwa.classification.models.freezing import StageOptions, reset_last_block
from ssod_imwa.classification.models.heads import ScaledClassifier, ScaleOptions
from ssod_imwa.classification.models.library_models import TIMM, LibraryClassifier
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.classification.models.vit import ViTOptions
from ssod_imwa.classification.models.weights import foreign_state, load_encoder
from ssod_imwa.classification.models.wide_resnet import WideResNetOptions
from ssod_imwa.config.averaging import most_episodes
from ssod_imwa.config.options import read_options
from ssod_imwa.data.order import MakeOrder
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.checkpoint.packages import (
    is_package,
    package_of,
    read_package,
    warn_of_pixels,
)
from ssod_imwa.errors import ConfigError, WeightsError, as_config_error

PREFIX = "deployed."


def with_iterations(cfg: CfgNode, train: ClassificationDataset) -> CfgNode:
    """A copy whose schedule is counted in iterations, as the trainer counts.

    Raises:
        ConfigError: the schedule is given twice, or is shorter than an iteration.
    """
    schedule = cfg.CLS.SCHEDULE
    if not schedule.EPOCHS:
        return cfg
    images = len(train)
    if cfg.CLS.SAMPLER.NAME == SUBSET:  # unions differ by a few images from member to member
        images = len(member_subset(cfg, train, cfg.IMWA.FIRST_MEMBER))
    per_epoch = images / cfg.SOLVER.IMS_PER_BATCH
    iterations = round(schedule.EPOCHS * per_epoch)
    if most_episodes(cfg, iterations) < cfg.IMWA.EPISODES:
        beyond = f" beyond IMWA.START = {cfg.IMWA.START:g} of them" if cfg.IMWA.START else ""
        raise ConfigError(
            f"CLS.SCHEDULE.EPOCHS = {schedule.EPOCHS:g} is {iterations} iterations of "
            f"SOLVER.IMS_PER_BATCH = {cfg.SOLVER.IMS_PER_BATCH} images (must be at least "
            f"IMWA.EPISODES = {cfg.IMWA.EPISODES}{beyond})"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.STEPS = [round(step * per_epoch) for step in schedule.STEPS]
    cfg.SOLVER.WARMUP_ITERS = round(schedule.WARMUP * per_epoch)
    cfg.CLS.SCHEDULE.EPOCHS = 0.0
    del cfg.CLS.SCHEDULE["STEPS"], cfg.CLS.SCHEDULE["WARMUP"]  # nothing to read without epochs
    cfg.freeze()
    return cfg


def statistics(cfg: CfgNode) -> Statistics:
    """Mean and deviation of pixels of 0..1, from those of 0..255.

    Raises:
        ConfigError: the network sees no pixels.
    """
    check_sees_images(cfg)
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    return Statistics(tuple(x / 255 for x in mean), tuple(x / 255 for x in std))


def check_sees_images(cfg: CfgNode) -> None:
    """Refuse a network on cached features where images are drawn, predicted or exported for.

    Raises:
        ConfigError: the network sees no pixels.
    """
    name = cfg.CLS.MODEL.NAME
    if name in ON_FEATURES:
        raise ConfigError(
            f"CLS.MODEL.NAME = {name!r} is not allowed here (must be a network of images: on "
            f"{ON_FEATURES[name]} it sees no pixels)"
        )


def check_features(cfg: CfgNode, data: ClassificationData) -> None:
    """Refuse a network on what it does not see, and features of several networks.

    Raises:
        ConfigError: CLS.MODEL does not go with the data sets, or one of them not with another.
    """
    train = data.train
    others = [] if data.unlabeled is None else [data.unlabeled]
    for dataset in (train, *others, *data.tests):
        _check_kind(cfg.CLS.MODEL, dataset)
        if not isinstance(dataset, FeatureDataset) or not isinstance(train, FeatureDataset):
            continue
        if dataset.source != train.source:
            raise ConfigError(
                f"features of {dataset.name} are by {dataset.source}, those of {train.name} by "
                f"{train.source} (must be the same)"
            )


def _check_kind(model: CfgNode, dataset: ClassificationDataset) -> None:
    """Refuse a network of CLS.MODEL on images, features or maps of another kind than it takes."""
    wanted = ON_FEATURES.get(model.NAME, "images")
    kind = dataset.kind if isinstance(dataset, FeatureDataset) else "images"
    if kind != wanted:
        owners = {kind: repr(name) for name, kind in ON_FEATURES.items()}
        raise ConfigError(
            f"CLS.MODEL.NAME = {model.NAME!r} is not allowed with {dataset.name}, which holds "
            f"{kind} (must be {owners.get(kind, 'a network of images')})"
        )
    if not isinstance(dataset, FeatureDataset):
        return
    if model.NAME == FEATURE_HEAD and dataset.width != model.WIDTH:
        raise ConfigError(
            f"CLS.MODEL.WIDTH = {model.WIDTH} is not allowed with {dataset.name} (must be "
            f"{dataset.width}, the features of an image)"
        )
    cut = (model.NETWORK, model.CACHED_STAGES) if model.NAME == FEATURE_TAIL else None
    if cut is not None and cut != (dataset.network, dataset.stages):
        raise ConfigError(
            f"CLS.MODEL.NETWORK = {cut[0]!r} and CACHED_STAGES = {cut[1]} are not allowed with "
            f"{dataset.name} (must be {dataset.network!r} and {dataset.stages}, which made it)"
        )


def build_views(cfg: CfgNode, dataset: ClassificationDataset, names: Sequence[str]) -> list[Any]:
    """The views of CLS.INPUT with these names, for images in memory or in files, or features.

    Raises:
        ConfigError: a name is not one of theirs.
    """
    if isinstance(dataset, FeatureDataset):
        with as_config_error("CLS.INPUT"):
            return [feature_view(name, dataset) for name in names]
    options = cfg.CLS.INPUT
    common = {
        "statistics": statistics(cfg),
        "size": options.SIZE,
        "flip": options.FLIP,
        "padding": read_options(PaddingOptions, options).padding,
        "cutout": read_options(CutoutOptions, options).cutout,
    }
    with as_config_error("CLS.INPUT"):
        if dataset.images is not None:
            height, stored = dataset.images.shape[-2:]
            if height != stored:
                raise ValueError(
                    f"images of {dataset.name} are {stored} x {height} pixels (must be square)"
                )
            return [small_view(name, stored=stored, **common) for name in names]
        common |= {"jitter": options.JITTER, "test_resize": options.TEST_RESIZE}
        return [large_view(name, **common) for name in names]


def build_test_view(cfg: CfgNode, dataset: ClassificationDataset) -> Any:
    """The view of test images: normalized, and files resized and cropped."""
    (view,) = build_views(cfg, dataset, ["test" if dataset.images is None else "none"])
    return view


def build_order(cfg: CfgNode, train: ClassificationDataset) -> MakeOrder:
    """Which images members train on."""
    name = cfg.CLS.SAMPLER.NAME
    return partial(
        class_sampler,
        name,
        train.labels,
        len(train.classes),
        iterations=cfg.SOLVER.MAX_ITER,
        options=read_options(SAMPLERS[name].options_class, cfg.CLS.SAMPLER),
    )


def balanced_order(cfg: CfgNode, train: ClassificationDataset) -> MakeOrder:
    """All classes equally often, whatever CLS.SAMPLER says of the labeled stream."""
    return partial(
        class_sampler,
        "class",
        train.labels,
        len(train.classes),
        iterations=cfg.SOLVER.MAX_ITER,
    )


def member_subset(cfg: CfgNode, train: ClassificationDataset, member: int) -> np.ndarray:
    """Positions of the images that are the member's own (BTM's D_m), int64 (n,)."""
    options = read_options(SubsetOptions, cfg.CLS.SAMPLER)
    return member_positions(train.labels, len(train.classes), options, seed=cfg.SEED, member=member)


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
            load_weights(model, weights, keep_classifier=not stage.reset_classifier)
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

    def build_one() -> ImageClassifier:
        return build_classifier(
            node.NAME,
            classes,
            classifier=read_options(ClassifierOptions, node).classifier,
            scale=read_options(CosineOptions, node).scale,
            image_size=read_options(InputOptions, cfg.CLS.INPUT).size,
            pretrained=imagenet,
            drop_path=read_options(ViTOptions, node).drop_path,
            wide_resnet=read_options(WideResNetOptions, node),
            feature_head=read_options(FeatureHeadOptions, node),
            feature_tail=read_options(FeatureTailOptions, node),
        )

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
) -> None:
    """Fill a network with the one that a run trained, given its folder or a file of it.

    Args:
        model: the network.
        source: folder or file; or a file of another program with the network's state dict.
        keep_classifier: whether the classifier's weights are taken, too.

    Raises:
        CheckpointError: the file is missing or damaged.
        WeightsError: it holds another network.
    """
    state = foreign_state(model, source)
    if state is None:
        state = deployed_state(read_models(source).weights)
    if not isinstance(model, MaskedAutoencoder):
        if is_autoencoder(state):
            load_encoder(model, encoder_state(state), source=source)
            return
        if not keep_classifier:
            load_encoder(model, state, source=source)
            return
    try:
        model.load_state_dict(_folded(state, like=model))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source} is of another network than CLS.MODEL: {first}") from error


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


def lr_factor(cfg: CfgNode, name: str) -> float:
    """Factor of the learning rate of a parameter of the student."""
    node = cfg.CLS.get("STAGE")
    factor = read_options(StageOptions, node).classifier_lr
    scaled = read_options(ScaleOptions, node).learnable_scale
    prefix = "classifier.classifier." if scaled else "classifier."
    return factor if name.removeprefix(PREFIX).startswith(prefix) else 1.0
