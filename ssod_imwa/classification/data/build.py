"""From a configuration to the images of a classification run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import reduce

from fvcore.common.config import CfgNode

from ssod_imwa.classification.data.catalog import load_images, load_unlabeled
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.imbalance import (
    ImbalanceOptions,
    SelectionOptions,
    held_out_images,
)
from ssod_imwa.classification.data.large_views import Resize
from ssod_imwa.classification.data.splits import (
    impose_imbalance,
    join_unlabeled,
    labeled_among,
    split_off_unlabeled,
    with_labeled,
)
from ssod_imwa.classification.data.unlabeled import UnlabeledOptions
from ssod_imwa.classification.generations import GenerationOptions, with_pseudo_labels
from ssod_imwa.config.options import Options, option, read_options
from ssod_imwa.data.registration import import_modules
from ssod_imwa.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputOptions(Options):
    """CLS.INPUT: how images are read and augmented."""

    size: int = option(32, "edge of the images that the network sees, in pixels", low=1)
    flip: bool = option(True, "mirror images at random", per_member=True)
    test_resize: Resize = option("bilinear", "how test images in files are resized; LiVT: bicubic")
    in_memory: bool = option(
        False, "read images that are in files into memory; they must be of SIZE"
    )


@dataclass(frozen=True)
class ClassificationData:
    """The images of a run, after imbalance was imposed.

    Attributes:
        train: labeled images, and in a later generation of CReST those that have got a label.
        unlabeled: None for a method that does not read any.
        tests: labeled images of the same classes.
        labeled_counts: images of each class with labels of their own.
    """

    train: ClassificationDataset
    unlabeled: ClassificationDataset | None
    tests: tuple[ClassificationDataset, ...]
    labeled_counts: list[int]

    @property
    def labeled(self) -> ClassificationDataset:
        """The training images with labels of their own, which come first."""
        return self.train.subset(range(sum(self.labeled_counts)))


def build_data(cfg: CfgNode) -> ClassificationData:
    """Read the data sets, thin the labeled training set and choose the unlabeled images.

    Raises:
        ConfigError: not exactly one training set, or no test set, is named, or nothing is left
            unlabeled for a method that needs it.
        DataError: a data set is missing or broken.
    """
    sets = cfg.DATASETS
    import_modules(sets.IMPORT)
    if len(sets.TRAIN) != 1:
        raise ConfigError(f"DATASETS.TRAIN = {sets.TRAIN} is not allowed (must name one data set)")
    if not sets.TEST:
        raise ConfigError("DATASETS.TEST = [] is not allowed (name at least one labeled set)")
    whole = _load_labeled(cfg, sets.TRAIN[0], on_bad_record=sets.ON_BAD_RECORD)
    imbalance, selection = _thinning(cfg)
    is_thinned = imbalance.ratio > 0 or imbalance.percent < 100
    train = impose_imbalance(whole, imbalance, selection) if is_thinned else whole
    tests = tuple(_load_labeled(cfg, name, classes=train.classes) for name in sets.TEST)
    for test in tests:
        if test.classes != train.classes:
            raise ConfigError(
                f"DATASETS.TEST: {test.name} has other classes than {train.name} "
                f"({len(test.classes)} and {len(train.classes)}; they must be the same)"
            )
    if "UNLABELED" not in cfg.CLS:
        return ClassificationData(train, None, tests, train.counts)
    _check_every_class(train)
    unlabeled = (
        _load_unlabeled(cfg, train) if sets.TRAIN_UNLABELED else _left_unlabeled(cfg, whole, train)
    )
    images = cfg.SOLVER.IMS_PER_BATCH_UNLABELED
    if len(unlabeled) < images:
        logger.warning(
            "%s: %d unlabeled images are fewer than SOLVER.IMS_PER_BATCH_UNLABELED = %d: a batch "
            "holds some of them several times",
            unlabeled.name,
            len(unlabeled),
            images,
        )
    counts, node = train.counts, cfg.CLS.get("CREST")
    labels = read_options(GenerationOptions, node).labels
    if labels:
        train = with_pseudo_labels(train, unlabeled, labels)
    return ClassificationData(train, unlabeled, tests, counts)


def build_held_out(cfg: CfgNode) -> ClassificationDataset:
    """The labeled images that CLS.IMBALANCE.HOLD_OUT sets aside, on which nothing is trained.

    Raises:
        ConfigError: there are none.
        DataError: the data set is missing or broken.
    """
    _, selection = _thinning(cfg)
    if not selection.hold_out:
        raise ConfigError(
            "CLS.IMBALANCE.HOLD_OUT = 0 is not allowed (must be above 0: labeled images are needed "
            "that nothing was trained on)"
        )
    sets = cfg.DATASETS
    import_modules(sets.IMPORT)
    whole = _load_labeled(cfg, sets.TRAIN[0], on_bad_record=sets.ON_BAD_RECORD)
    chosen = held_out_images(
        whole.labels,
        len(whole.classes),
        split=selection.split,
        seed=selection.seed,
        hold_out=selection.hold_out,
    )
    return whole.subset(chosen)


def _check_every_class(train: ClassificationDataset) -> None:
    """Refuse a class that could not be learned: pseudo-labels are of labeled classes alone."""
    empty = [name for name, count in zip(train.classes, train.counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{train.name}: {len(empty)} of {len(train.classes)} classes have no labeled images: "
            f"{', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''} (each needs at least 1)"
        )


def _load_labeled(
    cfg: CfgNode,
    name: str,
    *,
    classes: tuple[str, ...] | None = None,
    on_bad_record: str = "error",
) -> ClassificationDataset:
    dataset = load_images(
        name,
        root=cfg.DATASETS.ROOT,
        classes=classes,
        in_memory=read_options(InputOptions, cfg.CLS.INPUT).in_memory,
        on_bad_record=on_bad_record,
    )
    if not dataset.is_labeled:
        raise ConfigError(
            f"data set {name!r} has no labels (must be in DATASETS.TRAIN_UNLABELED, not in TRAIN "
            "or TEST)"
        )
    return dataset


def _thinning(cfg: CfgNode) -> tuple[ImbalanceOptions, SelectionOptions]:
    imbalance = read_options(ImbalanceOptions, cfg.CLS.IMBALANCE)
    selection = read_options(SelectionOptions, cfg.CLS.IMBALANCE)
    if selection.seed == -1:  # NumPy's legacy generator takes 32 bits
        selection = replace(selection, seed=cfg.SEED % 2**32)
    return imbalance, selection


def _left_unlabeled(
    cfg: CfgNode, whole: ClassificationDataset, train: ClassificationDataset
) -> ClassificationDataset:
    """The images of TRAIN that lose their labels."""
    options = read_options(UnlabeledOptions, cfg.CLS.UNLABELED)
    unlabeled = split_off_unlabeled(whole, *_thinning(cfg), options)
    if not len(unlabeled):
        raise ConfigError(
            f"no image of {whole.name} is unlabeled (lower CLS.IMBALANCE.MAXIMUM or PERCENT, or "
            "name a data set in DATASETS.TRAIN_UNLABELED)"
        )
    if options.membership == "disjoint":
        # Published sets hold some images twice, so this is no reason to stop.
        twice = int(labeled_among(unlabeled, train).sum())
        if twice:
            logger.warning(
                "%s: %d of %d unlabeled images are the same as labeled ones: the set holds them "
                "more than once",
                whole.name,
                twice,
                len(unlabeled),
            )
    return unlabeled


def _load_unlabeled(cfg: CfgNode, train: ClassificationDataset) -> ClassificationDataset:
    """The images of TRAIN_UNLABELED."""
    sets, options = cfg.DATASETS, read_options(UnlabeledOptions, cfg.CLS.UNLABELED)
    if options.maximum:
        raise ConfigError(
            f"CLS.UNLABELED.MAXIMUM = {options.maximum} is not allowed with "
            "DATASETS.TRAIN_UNLABELED (must be 0: its sets are taken as they are)"
        )
    others = [
        load_unlabeled(
            name,
            root=sets.ROOT,
            classes=train.classes,
            in_memory=read_options(InputOptions, cfg.CLS.INPUT).in_memory,
            on_bad_record=sets.ON_BAD_RECORD,
        )
        for name in sets.TRAIN_UNLABELED
    ]
    return with_labeled(reduce(join_unlabeled, others), train, options.membership)
