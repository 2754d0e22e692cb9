"""From a configuration to the parts of a detection run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.config.options import Options, may_differ, read_options
from ssod_imwa.data.loader import TrainBatches, build_test_batches, build_train_batches
from ssod_imwa.data.order import BatchStream, Draw, DrawnStream, MakeOrder
from ssod_imwa.data.polling import Poll
from ssod_imwa.data.registration import import_modules
from ssod_imwa.data.roots import data_root
from ssod_imwa.data.streams import On, Stream, select_views
from ssod_imwa.detection.data.catalog import load_datasets
from ssod_imwa.detection.data.geometric_views import ColoredView, GeometricOptions, GeometricView
from ssod_imwa.detection.data.images import DetectionImages, orientation_groups
from ssod_imwa.detection.data.records import Annotations, DetectionDataset
from ssod_imwa.detection.data.splits import split_dataset
from ssod_imwa.detection.data.views import (
    StrongOptions,
    StrongView,
    TestView,
    ViewOptions,
    WeakView,
)
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.evaluation import evaluate_detections, predict
from ssod_imwa.detection.keys import METHODS, SplitOptions
from ssod_imwa.detection.methods.base import DetectionMethod
from ssod_imwa.errors import ConfigError, as_config_error
from ssod_imwa.task import check_batch_sizes, evaluate_sets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionData:
    """The images of a run.

    Attributes:
        labeled: to learn from.
        unlabeled: likewise; None for a method that does not read any.
        tests: to evaluate on.
        hidden_truth: annotations of the unlabeled images, None where there are none: labels of the
            training set that the split took away, to judge a teacher by.
    """

    labeled: DetectionDataset
    unlabeled: DetectionDataset | None
    tests: tuple[DetectionDataset, ...]
    hidden_truth: tuple[Annotations | None, ...] = ()


def build_data(cfg: CfgNode) -> DetectionData:
    """Read the data sets and split the labeled one.

    Raises:
        ConfigError: no training or no test set is named, or nothing is left unlabeled for a method
            that needs it.
        DataError: a data set is missing or broken.
    """
    sets = cfg.DATASETS
    import_modules(sets.IMPORT)
    if not sets.TRAIN:
        raise ConfigError("DATASETS.TRAIN = [] is not allowed (name at least one labeled set)")
    whole = _load(cfg, sets.TRAIN)
    split = read_options(SplitOptions, sets.SPLIT)
    labeled, rest = split_dataset(
        whole,
        percent=split.percent,
        fold=split.fold,
        file=data_root(sets.ROOT) / split.file if split.file else "",
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
    )
    if left_out := len(whole) - len(labeled) - len(rest):
        counts = left_out, len(whole)
        logger.info("%s: %d of %d images have no box and are left out", whole.name, *counts)
    unlabeled: DetectionDataset | None = None
    hidden_truth: tuple[Annotations | None, ...] = ()
    if "unlabeled" in METHODS[cfg.SSOD.ALGORITHM][0].reads:
        more = _load(cfg, sets.TRAIN_UNLABELED, labeled=False) if sets.TRAIN_UNLABELED else None
        unlabeled = _join(rest, more)
        _check_unlabeled(cfg, unlabeled)
        hidden_truth = _hidden_truth(whole, rest, unlabeled)
    return DetectionData(labeled, unlabeled, build_tests(cfg, labeled.classes), hidden_truth)


def build_tests(cfg: CfgNode, classes: tuple[str, ...]) -> tuple[DetectionDataset, ...]:
    """The test sets, whose classes have to be the detector's."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST = [] is not allowed (name at least one labeled set)")
    tests = tuple(_load(cfg, [name]) for name in cfg.DATASETS.TEST)
    for test in tests:
        if test.classes != classes:
            raise ConfigError(
                f"DATASETS.TEST: {test.name} has the classes {', '.join(test.classes)} "
                f"(must be those of DATASETS.TRAIN: {', '.join(classes)})"
            )
    return tests


def with_classes(cfg: CfgNode, classes: tuple[str, ...]) -> CfgNode:
    """A copy that says how many classes the detector has, so that a saved one tells by itself.

    Raises:
        ConfigError: it says another number.
    """
    stated = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if stated not in (0, len(classes)):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES = {stated} is not allowed (the labeled data has "
            f"{len(classes)} classes; 0 takes their number)"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    cfg.freeze()
    return cfg


def build_method(cfg: CfgNode, detector: Detector) -> DetectionMethod:
    """The method of SSOD around a detector, which becomes its student.

    Raises:
        ConfigError: the detector or the strong views do not go with the method.
    """
    if not cfg.MODEL.WEIGHTS:
        detector.warn_if_frozen()
    method: Callable[[Detector, Any], DetectionMethod] = METHODS[cfg.SSOD.ALGORITHM][0]
    return method(detector, _method_options(cfg))


def method_settings(cfg: CfgNode) -> dict[str, Any]:
    """What `Method.use` takes for a member with this configuration.

    Raises:
        ConfigError: the strong views do not go with the method.
    """
    options = _method_options(cfg)
    return {"options": options} if may_differ(type(options)) else {}


def _method_options(cfg: CfgNode) -> Options:
    kind, options = METHODS[cfg.SSOD.ALGORITHM]
    if kind.same_geometry and cfg.INPUT.STRONG.KIND == "geometric":
        raise ConfigError(
            f"INPUT.STRONG.KIND = 'geometric' is not allowed with SSOD.ALGORITHM = "
            f"{cfg.SSOD.ALGORITHM!r} (must be 'photometric': it learns maps location by location)"
        )
    with as_config_error("SSOD"):
        return read_options(options, cfg.SSOD)


def build_views(cfg: CfgNode) -> dict[str, Any]:
    """The views of INPUT, by the names by which methods read them."""
    options, settings = read_options(ViewOptions, cfg.INPUT), cfg.INPUT.STRONG
    flip = options.random_flip == "horizontal"
    with as_config_error("INPUT"):
        weak = WeakView(
            options.min_size_train,
            options.max_size_train,
            flip=flip,
            sampling=options.min_size_train_sampling,
        )
    strong: GeometricView | On
    with as_config_error("INPUT.STRONG"):
        geometric = read_options(GeometricOptions, None)
        if settings.KIND == "geometric":
            geometric = read_options(GeometricOptions, settings)
            strong = GeometricView(weak, geometric)
        else:
            strong = On("weak", StrongView(read_options(StrongOptions, settings)))
    # Pictures make all views, one after another from one generator: a new one stands at the end.
    return {"weak": weak, "strong": strong, "colored": ColoredView(weak, geometric.lists)}


def build_test_view(cfg: CfgNode) -> TestView:
    """The resizing of INPUT for evaluation."""
    return TestView(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)


def build_batches(
    cfg: CfgNode,
    data: DetectionData,
    schedule: EpisodeSchedule,
    ranks: Ranks,
    reads: Mapping[str, tuple[str, ...]],
    *,
    own: Sequence[CfgNode] = (),
) -> TrainBatches:
    """What the trainer reads: a global step -> the batches from there on.

    Args:
        cfg: of the run.
        data: of `build_data`.
        schedule: which member trains when.
        ranks: who else trains.
        reads: streams and views of the method, see `Method`.
        own: the configuration of each member, where members differ.
    """
    check_batch_sizes(cfg, ranks.batch.size)
    draw = build_draw(cfg, ranks.batch.size)

    def streams(cfg: CfgNode) -> list[Stream]:
        return [_build_stream(cfg, data, name, views, draw) for name, views in reads.items()]

    return build_train_batches(
        streams(cfg),
        schedule,
        ranks.batch,
        seed=cfg.SEED,
        first_member=cfg.IMWA.FIRST_MEMBER,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        on_bad_record=cfg.DATASETS.ON_BAD_RECORD,
        pin_memory=cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available(),
        own=[streams(each) for each in own],
    )


def build_draw(cfg: CfgNode, processes: int) -> Draw | None:
    """What decides how many images of a batch are labeled, if they are drawn.

    Raises:
        ConfigError: images cannot be shared out to draws, or draws to processes.
    """
    loader = cfg.DATALOADER  # without unlabeled images there is nothing to choose
    if "BATCH_RULE" not in loader or loader.BATCH_RULE == "fixed":
        return None
    labeled, unlabeled = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    size, total = loader.DRAWN_TOGETHER, labeled + unlabeled
    if total % (size * processes):
        raise ConfigError(
            f"DATALOADER.DRAWN_TOGETHER = {size} is not allowed with {total} images a step on "
            f"{processes} processes (their number must be a multiple of {size * processes})"
        )
    if cfg.SOLVER.ACCUMULATION_STEPS > 1:
        raise ConfigError(
            f"SOLVER.ACCUMULATION_STEPS = {cfg.SOLVER.ACCUMULATION_STEPS} is not allowed with "
            "DATALOADER.BATCH_RULE = 'drawn' (must be 1: drawn batches cannot be cut evenly)"
        )
    return Draw(total // size, size, labeled / total)


def _build_stream(
    cfg: CfgNode, data: DetectionData, name: str, views: tuple[str, ...], draw: Draw | None
) -> Stream:
    if name == "labeled":
        images, batch_size = DetectionImages.labeled(data.labeled), cfg.SOLVER.IMS_PER_BATCH
    elif name == "unlabeled" and data.unlabeled is not None:
        images = DetectionImages.unlabeled(data.unlabeled)
        batch_size = cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    else:
        raise ValueError(f"stream {name!r} is not allowed (must be 'labeled' or 'unlabeled')")
    grouping = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    groups = orientation_groups(images.records) if grouping else [np.arange(len(images))]
    order: MakeOrder = partial(BatchStream, groups)
    if draw is not None:
        order = partial(DrawnStream, groups, draw=draw, labeled=name == "labeled")
    return Stream(
        name,
        images,
        order,
        batch_size=batch_size,
        views=select_views(build_views(cfg), views),
    )


def build_evaluator(
    cfg: CfgNode,
    tests: tuple[DetectionDataset, ...],
    processes: Group,
    *,
    poll: Poll | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function from a detector to its metrics in percent.

    The names of the metrics are preceded by "DATASET/" if there are several test sets.
    """
    view = build_test_view(cfg)

    def evaluate(model: Detector, test: DetectionDataset) -> dict[str, float]:
        batches = build_test_batches(
            DetectionImages.unlabeled(test),
            view,
            processes,
            batch_size=cfg.TEST.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        predictions = predict(model, test, batches, processes, poll=poll)
        return evaluate_detections(test, predictions, voc=True)

    return lambda model: evaluate_sets(tests, partial(evaluate, model))


def _load(cfg: CfgNode, names: list[str], *, labeled: bool = True) -> DetectionDataset:
    return load_datasets(
        names,
        root=cfg.DATASETS.ROOT,
        labeled=labeled,
        on_bad_record=cfg.DATASETS.ON_BAD_RECORD,
    )


def _join(*parts: DetectionDataset | None) -> DetectionDataset:
    present = [part for part in parts if part is not None]
    records = tuple(record for part in present for record in part.records)
    return DetectionDataset("+".join(part.name for part in present), records, ())


def _hidden_truth(
    whole: DetectionDataset, rest: DetectionDataset, unlabeled: DetectionDataset
) -> tuple[Annotations | None, ...]:
    """What the split took from the rest, which stand first among the unlabeled images."""
    annotations = {record.image_id: record.annotations for record in whole.records}
    truths = [annotations[record.image_id] for record in rest.records]
    return (*truths, *[None] * (len(unlabeled) - len(rest)))


def _check_unlabeled(cfg: CfgNode, unlabeled: DetectionDataset) -> None:
    method, percent = cfg.SSOD.ALGORITHM, cfg.DATASETS.SPLIT.PERCENT
    if not len(unlabeled):
        raise ConfigError(
            f"SSOD.ALGORITHM = {method!r} has no unlabeled images (name some in "
            f"DATASETS.TRAIN_UNLABELED or lower DATASETS.SPLIT.PERCENT = {percent:g})"
        )
