"""From a configuration to the parts of a classification run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from ssod_imwa.classification.data.augmentation import Statistics
from ssod_imwa.classification.data.build import ClassificationData, InputOptions
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import FeatureDataset, feature_view
from ssod_imwa.classification.data.images import ImagesInFiles, ImagesInMemory
from ssod_imwa.classification.data.large_views import JitterOptions, large_view
from ssod_imwa.classification.data.samplers import SAMPLERS, SUBSET, class_sampler
from ssod_imwa.classification.data.small_views import CutoutOptions, PaddingOptions, small_view
from ssod_imwa.classification.data.subsets import SubsetOptions, member_positions
from ssod_imwa.classification.models.build import ON_FEATURES
from ssod_imwa.classification.models.feature_head import NAME as FEATURE_HEAD
from ssod_imwa.classification.models.feature_tail import NAME as FEATURE_TAIL
from ssod_imwa.classification.models.freezing import StageOptions
from ssod_imwa.classification.models.heads import ScaleOptions
from ssod_imwa.classification.networks import PREFIX
from ssod_imwa.config.averaging import most_episodes
from ssod_imwa.config.options import read_options
from ssod_imwa.data.order import BatchStream, MakeOrder
from ssod_imwa.data.streams import Stream
from ssod_imwa.errors import ConfigError, as_config_error


def with_iterations(cfg: CfgNode, train: ClassificationDataset) -> CfgNode:
    """A copy whose schedule is counted in iterations, as the trainer counts.

    Raises:
        ConfigError: the schedule is given twice, or is shorter than an iteration.
    """
    schedule = cfg.CLS.SCHEDULE
    if not schedule.EPOCHS:
        return cfg
    per_epoch = iterations_per_epoch(cfg, train)
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
    cfg.SOLVER.WARMUP_ITERS = round(schedule.WARMUP * per_epoch)
    if "STEPS" in schedule:
        cfg.SOLVER.STEPS = [round(step * per_epoch) for step in schedule.STEPS]
    # Nothing reads the others without epochs.
    cfg.CLS.SCHEDULE = CfgNode({"EPOCHS": 0.0})
    cfg.freeze()
    return cfg


def iterations_per_epoch(cfg: CfgNode, train: ClassificationDataset) -> float:
    """Own iterations of a member in which it sees as many images as it has to learn from."""
    images = len(train)
    if cfg.CLS.SAMPLER.NAME == SUBSET:  # unions differ by a few images from member to member
        images = len(member_subset(cfg, train, cfg.IMWA.FIRST_MEMBER))
    return images / cfg.SOLVER.IMS_PER_BATCH


def statistics(cfg: CfgNode) -> Statistics:
    """Mean and deviation of pixels of 0..1, from those of 0..255.

    Raises:
        ConfigError: the network sees no pixels, or they are not one number for each of the three
            channels.
    """
    check_sees_images(cfg)
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    for key, values in (("PIXEL_MEAN", mean), ("PIXEL_STD", std)):
        if len(values) != 3:
            raise ConfigError(f"MODEL.{key} = {values} is not allowed (must have 3 values)")
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
    options, resize = cfg.CLS.INPUT, cfg.CLS.INPUT.TEST_RESIZE
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
            if resize != InputOptions.test_resize:
                raise ValueError(
                    f"TEST_RESIZE = {resize!r} has no meaning with {dataset.name}, whose images "
                    "are in memory and are not resized"
                )
            return [small_view(name, stored=stored, **common) for name in names]
        jitter = read_options(JitterOptions, options).jitter
        common |= {"jitter": jitter, "test_resize": resize}
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


OpenImages = Callable[[str, ClassificationDataset], ImagesInFiles | ImagesInMemory]
"""The images of a data set that a stream of this name reads."""


def build_streams(
    cfg: CfgNode, data: ClassificationData, reads: Mapping[str, tuple[str, ...]], images: OpenImages
) -> list[Stream]:
    """What a member reads in each iteration.

    Args:
        cfg: of the member.
        data: of the run.
        reads: names of the views of each stream, as the method says.
        images: see `OpenImages`.

    Raises:
        ConfigError: a view is not one of the data set's.
        ValueError: there is no such stream.
    """
    return [_build_stream(cfg, data, name, views, images) for name, views in reads.items()]


def _build_stream(
    cfg: CfgNode, data: ClassificationData, name: str, views: tuple[str, ...], images: OpenImages
) -> Stream:
    if name == "unlabeled":
        return _unlabeled_stream(cfg, data.unlabeled, views, images)
    if name not in ("labeled", "balanced"):
        raise ValueError(
            f"stream {name!r} is not allowed (must be 'labeled', 'balanced' or 'unlabeled')"
        )
    chosen, order = cfg.CLS.INPUT.VIEWS, build_order
    if name == "balanced":  # CoSSL's, in the unlabeled images' strong views
        chosen, order = cfg.CLS.INPUT.UNLABELED_VIEWS[1:], balanced_order
    transforms = build_views(cfg, data.train, chosen[: len(views)])
    return Stream(
        name,
        images("labeled", data.train),
        order(cfg, data.train),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        views=dict(zip(views, transforms, strict=True)),
    )


def _unlabeled_stream(
    cfg: CfgNode,
    unlabeled: ClassificationDataset | None,
    views: tuple[str, ...],
    images: OpenImages,
) -> Stream:
    if unlabeled is None:
        raise ValueError(f"CLS.ALGORITHM = {cfg.CLS.ALGORITHM!r} does not share 'unlabeled'")
    transforms = build_views(cfg, unlabeled, cfg.CLS.INPUT.UNLABELED_VIEWS)
    return Stream(
        "unlabeled",
        images("unlabeled", unlabeled),
        partial(BatchStream, [np.arange(len(unlabeled))]),
        batch_size=cfg.SOLVER.IMS_PER_BATCH_UNLABELED,
        views=dict(zip(views, transforms, strict=True)),
    )


def member_subset(cfg: CfgNode, train: ClassificationDataset, member: int) -> np.ndarray:
    """Positions of the images that are the member's own (BTM's D_m), int64 (n,)."""
    options = read_options(SubsetOptions, cfg.CLS.SAMPLER)
    return member_positions(train.labels, len(train.classes), options, seed=cfg.SEED, member=member)


def lr_factor(cfg: CfgNode, name: str) -> float:
    """Factor of the learning rate of a parameter of the student."""
    node = cfg.CLS.get("STAGE")
    factor = read_options(StageOptions, node).classifier_lr
    scaled = read_options(ScaleOptions, node).learnable_scale
    prefix = "classifier.classifier." if scaled else "classifier."
    of_network = re.sub(r"^experts\.\d+\.", "", name.removeprefix(PREFIX))
    return factor if of_network.startswith(prefix) else 1.0
