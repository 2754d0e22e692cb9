"""Every key of classification, and what it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from ssod_imwa.classification.data.build import InputOptions
from ssod_imwa.classification.data.imbalance import ImbalanceOptions, SelectionOptions
from ssod_imwa.classification.data.large_views import JitterOptions
from ssod_imwa.classification.data.samplers import SAMPLERS, SUBSET, SamplerChoice
from ssod_imwa.classification.data.small_views import PADDED, CutoutOptions, PaddingOptions
from ssod_imwa.classification.data.unlabeled import UnlabeledOptions
from ssod_imwa.classification.evaluation import GroupOptions
from ssod_imwa.classification.extras.abc import ABCOptions
from ssod_imwa.classification.generations import GenerationOptions
from ssod_imwa.classification.labelers.build import (
    LABELERS,
    WITH_STATISTICS,
    LabelerChoice,
    StatisticsOptions,
)
from ssod_imwa.classification.losses.build import LOSSES, LossChoice
from ssod_imwa.classification.methods.base import EMAForm, EMAOptions
from ssod_imwa.classification.methods.build import METHODS, CompileOptions, MethodChoice, Shared
from ssod_imwa.classification.methods.moco import MoCoOptions
from ssod_imwa.classification.mixers import MIXERS, MixerChoice
from ssod_imwa.classification.models.build import (
    VITS,
    WIDE_RESNETS,
    NetworkOptions,
)
from ssod_imwa.classification.models.classifiers import (
    COSINES,
    ClassifierOptions,
    CosineOptions,
    TauNormOptions,
)
from ssod_imwa.classification.models.experts import ExpertsOptions
from ssod_imwa.classification.models.feature_head import NAME as FEATURE_HEAD
from ssod_imwa.classification.models.feature_head import FeatureHeadOptions
from ssod_imwa.classification.models.feature_tail import NAME as FEATURE_TAIL
from ssod_imwa.classification.models.feature_tail import FeatureTailOptions
from ssod_imwa.classification.models.freezing import StageOptions
from ssod_imwa.classification.models.heads import ScaleOptions
from ssod_imwa.classification.models.vit import LayerDecayOptions, ViTOptions
from ssod_imwa.classification.models.wide_resnet import WideResNetOptions
from ssod_imwa.classification.prediction import FlipOptions, PostHocOptions
from ssod_imwa.classification.tracking import SnapshotOptions, TrackingOptions
from ssod_imwa.config.options import (
    ABOVE_0,
    BELOW_100,
    Options,
    Switch,
    Values,
    beginning_with,
    option,
)
from ssod_imwa.config.sections import Section
from ssod_imwa.config.shared import IN_STEPS
from ssod_imwa.engine.checkpoint.packages import PIXEL_MEAN, PIXEL_STD

Conditions = Mapping[str, Values]
IS_LITE = beginning_with("timm:tf_efficientnet_lite")
SEES_PIXELS = Switch(
    f"not {FEATURE_HEAD!r} nor {FEATURE_TAIL!r}",
    lambda name: name not in (FEATURE_HEAD, FEATURE_TAIL),
)
OTHER_PIXELS = Switch(
    f"{SEES_PIXELS.words} nor {IS_LITE.words}",
    lambda name: name in SEES_PIXELS and name not in IS_LITE,
)


@dataclass(frozen=True)
class WeightsOptions(Options):
    """MODEL: what the network begins with."""

    weights: str = option(
        "",
        'initial weights: "" (random), "imagenet" (torchvision\'s), a run\'s folder, or a file of '
        "a run, or of another program with a state dict of this network, or package:NAME, those of "
        "a Python package for timm's network (docs/backbones.md)",
        free=True,
    )


@dataclass(frozen=True)
class PixelOptions(Options):
    """MODEL: what pixels the network is given."""

    pixel_mean: list[float] = option([123.675, 116.28, 103.53], "subtracted from pixels (0..255)")
    pixel_std: list[float] = option(
        [58.395, 57.12, 57.375], "divided into pixels (0..255)", above=0
    )


@dataclass(frozen=True)
class LitePixelOptions(PixelOptions):
    """MODEL: the same for EfficientNet-Lite, whose weights know other pixels."""

    pixel_mean: list[float] = option(PIXEL_MEAN, "subtracted from pixels (0..255)")
    pixel_std: list[float] = option(PIXEL_STD, "divided into pixels (0..255)", above=0)


@dataclass(frozen=True)
class ViewsOptions(Options):
    """CLS.INPUT: of labeled images alone."""

    views: list[str] = option(
        ["plain"],
        'augmentation of each view that the method reads: "none", "plain", "jittered", "strong", '
        '"sim" for images in memory; "standard", "randcls", "randclsstack", "sim" (PaCo, NCL, '
        'GPaCo), "bcl_sim", "bcl_randclsstack" (BCL), "mae", "livt" for files; "weak", '
        '"randaugment" (FixMatch) for both',
    )


@dataclass(frozen=True)
class SemiSupervisedViewsOptions(Options):
    """CLS.INPUT: of methods that read unlabeled images, too."""

    views: list[str] = option(["weak"], "as for other methods, of labeled images")
    unlabeled_views: list[str] = option(
        ["weak", "randaugment"], "the same of each view that the method reads of unlabeled images"
    )


@dataclass(frozen=True)
class UnlabeledSetOptions(Options):
    """DATASETS: images without labels."""

    train_unlabeled: list[str] = option(
        [],
        "data sets whose images are trained on without labels; [] takes those that CLS.IMBALANCE "
        "and CLS.UNLABELED leave of TRAIN",
    )


@dataclass(frozen=True)
class UnlabeledBatchOptions(Options):
    """SOLVER: images without labels."""

    ims_per_batch_unlabeled: int = option(
        16, "unlabeled images of an iteration (μB), over all GPUs", low=1
    )


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """CLS.SCHEDULE: a schedule in passes over the images that are sampled from."""

    epochs: float = option(
        0.0,
        "length; with 0 SOLVER's MAX_ITER, STEPS and WARMUP_ITERS count, which these three replace",
        low=0,
    )
    warmup: float = option(
        0.0, "epochs in which the rate rises to BASE_LR", low=0, when={"epochs": ABOVE_0}
    )


@dataclass(frozen=True)
class ScheduleStepOptions(Options):
    """CLS.SCHEDULE: of WarmupMultiStepLR alone."""

    steps: list[float] = option([], "epochs after which the rate is multiplied by GAMMA", low=0)


@dataclass(frozen=True)
class MergeOptions(Options):
    """CLS: how members become one."""

    merge: Literal["mean", "adaptive_h", "adaptive_g", "greedy_h", "greedy_g"] = option(
        "mean",
        "how members are averaged: alike, in proportion to their H- or G-mean on the balanced "
        "training images, or greedily (BTM, Table 6)",
    )


# What makes a choice among the labeled images, one or the other.
THINNED: Mapping[str, Values] = {
    "CLS.IMBALANCE.RATIO": ABOVE_0,
    "CLS.IMBALANCE.PERCENT": BELOW_100,
}
CLASSIFICATION: Conditions = {"TASK": ("classification",)}
EPOCHS = "CLS.SCHEDULE.EPOCHS"
# What CLS.SCHEDULE takes the place of while EPOCHS is above 0.
REPLACED_BY_EPOCHS = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS")
PIXELS: Conditions = {**CLASSIFICATION, "CLS.MODEL.NAME": SEES_PIXELS}
FIXMATCH: Conditions = {**CLASSIFICATION, "CLS.ALGORITHM": ("fixmatch",)}


def _with(shared: Shared) -> Conditions:
    """The conditions of keys that some methods share."""
    names = (name for name, entry in METHODS.items() if shared in entry.shares)
    return {**CLASSIFICATION, "CLS.ALGORITHM": tuple(names)}


def _without(shared: Shared) -> Conditions:
    """The conditions of keys that all other methods have."""
    names = (name for name, entry in METHODS.items() if shared not in entry.shares)
    return {**CLASSIFICATION, "CLS.ALGORITHM": tuple(names)}


def _holding(*views: str) -> Switch:
    """The lists of views that hold one of some."""
    words = f"that hold {' or '.join(map(repr, views))}"
    # A text is a list that is not yet read.
    return Switch(
        words,
        lambda value: isinstance(value, (list, tuple, str)) and any(x in value for x in views),
    )


def _by_name(
    prefix: str,
    key: str,
    options: Iterable[tuple[str, type[Options]]],
    when: Conditions,
    *,
    per_member: bool = False,
) -> Iterator[Section]:
    """A section for each type of options, read with the names at `key` that have it."""
    names: dict[type[Options], list[str]] = {}
    for name, kind in options:
        names.setdefault(kind, []).append(name)
    for kind, those in names.items():
        if fields(kind):
            yield Section(prefix, kind, {**when, key: tuple(those)}, per_member=per_member)


SECTIONS = (
    Section("CLS", MethodChoice, CLASSIFICATION),
    Section("CLS.STAGE", StageOptions, _with("classifier")),
    *(
        Section(
            entry.prefix,
            entry.options,
            {**CLASSIFICATION, "CLS.ALGORITHM": (name,), **entry.when},
        )
        for name, entry in METHODS.items()
    ),
    *(
        Section(
            "CLS.MOCO",
            MoCoOptions,
            {**CLASSIFICATION, "CLS.ALGORITHM": (name,), f"{entry.prefix}.{weight}": ABOVE_0},
        )
        for name, entry in METHODS.items()
        if (weight := entry.moco_weight)
    ),
    Section("CLS.LOSS", LossChoice, _with("loss"), per_member=True),
    *_by_name(
        *("CLS.LOSS", "CLS.LOSS.NAME"),
        ((name, loss.options_class) for name, loss in LOSSES.items()),
        _with("loss"),
        per_member=True,
    ),
    Section("CLS.LABELER", LabelerChoice, FIXMATCH),
    Section("CLS.FIXMATCH", StatisticsOptions, {**FIXMATCH, "CLS.LABELER.NAME": WITH_STATISTICS}),
    *_by_name(
        *("CLS.LABELER", "CLS.LABELER.NAME"),
        ((name, labeler.options_class) for name, labeler in LABELERS.items()),
        FIXMATCH,
    ),
    Section("CLS.CREST", GenerationOptions, FIXMATCH),
    Section("CLS.ABC", ABCOptions, {**FIXMATCH, "CLS.FIXMATCH.SECOND_HEAD": ("abc",)}),
    Section("CLS.MIX", MixerChoice, _with("mixer"), per_member=True),
    *_by_name(
        *("CLS.MIX", "CLS.MIX.KIND"),
        ((name, mixer.options_class) for name, mixer in MIXERS.items()),
        _with("mixer"),
        per_member=True,
    ),
    Section("CLS.SAMPLER", SamplerChoice, CLASSIFICATION, per_member=True),
    *_by_name(
        "CLS.SAMPLER",
        "CLS.SAMPLER.NAME",
        ((name, sampler.options_class) for name, sampler in SAMPLERS.items()),
        CLASSIFICATION,
        per_member=True,
    ),
    Section("CLS", MergeOptions, {**_with("classifier"), "CLS.SAMPLER.NAME": (SUBSET,)}),
    Section("CLS.MODEL", NetworkOptions, CLASSIFICATION),
    Section("CLS.MODEL", CompileOptions, CLASSIFICATION),
    Section("CLS.MODEL", ViTOptions, {**CLASSIFICATION, "CLS.MODEL.NAME": tuple(VITS)}),
    Section(
        "CLS.MODEL",
        WideResNetOptions,
        {**CLASSIFICATION, "CLS.MODEL.NAME": tuple(WIDE_RESNETS)},
    ),
    Section("CLS.MODEL", FeatureHeadOptions, {**CLASSIFICATION, "CLS.MODEL.NAME": (FEATURE_HEAD,)}),
    Section("CLS.MODEL", FeatureTailOptions, {**CLASSIFICATION, "CLS.MODEL.NAME": (FEATURE_TAIL,)}),
    Section("CLS.MODEL", ExpertsOptions, _with("experts")),
    Section("CLS.MODEL", ClassifierOptions, _with("classifier")),
    Section(
        "CLS.MODEL",
        CosineOptions,
        {**_with("classifier"), "CLS.MODEL.CLASSIFIER": COSINES},
    ),
    Section("CLS.STAGE", ScaleOptions, _with("second_stage")),
    Section("CLS.STAGE", TauNormOptions, _with("second_stage")),
    Section(
        "CLS.STAGE",
        LayerDecayOptions,
        {**_with("second_stage"), "CLS.MODEL.NAME": tuple(VITS)},
    ),
    Section("CLS", EMAOptions, _with("classifier")),
    Section("CLS", EMAForm, {**_with("unlabeled"), "CLS.EMA_DECAY": ABOVE_0}),
    Section("CLS", GroupOptions, _with("classifier")),
    Section("TEST", FlipOptions, {**_with("classifier"), **PIXELS}),
    Section("TEST", PostHocOptions, _with("classifier")),
    Section("CLS", TrackingOptions, _with("classifier")),
    Section("CLS", SnapshotOptions, CLASSIFICATION),
    Section("MODEL", WeightsOptions, CLASSIFICATION),
    Section("MODEL", PixelOptions, {**CLASSIFICATION, "CLS.MODEL.NAME": OTHER_PIXELS}),
    Section("MODEL", LitePixelOptions, {**CLASSIFICATION, "CLS.MODEL.NAME": IS_LITE}),
    Section("DATASETS", UnlabeledSetOptions, _with("unlabeled")),
    Section("SOLVER", UnlabeledBatchOptions, _with("unlabeled")),
    Section("CLS.INPUT", InputOptions, PIXELS),
    Section("CLS.INPUT", ViewsOptions, _without("unlabeled"), per_member=True),
    Section("CLS.INPUT", SemiSupervisedViewsOptions, _with("unlabeled"), per_member=True),
    *(
        Section("CLS.INPUT", kind, {**PIXELS, "CLS.INPUT.VIEWS": _holding(*views)}, per_member=True)
        for kind, views in ((PaddingOptions, PADDED), (JitterOptions, ("standard",)))
    ),
    *(
        Section(
            "CLS.INPUT",
            CutoutOptions,
            {**PIXELS, **methods, key: _holding("randaugment")},
            per_member=True,
        )
        for methods, key in (
            (_without("unlabeled"), "CLS.INPUT.VIEWS"),
            (_with("unlabeled"), "CLS.INPUT.UNLABELED_VIEWS"),
        )
    ),
    Section("CLS.IMBALANCE", ImbalanceOptions, CLASSIFICATION),
    *(
        Section("CLS.IMBALANCE", SelectionOptions, {**CLASSIFICATION, key: values})
        for key, values in THINNED.items()
    ),
    Section("CLS.UNLABELED", UnlabeledOptions, _with("unlabeled")),
    Section("CLS.SCHEDULE", ScheduleOptions, CLASSIFICATION),
    Section(
        "CLS.SCHEDULE",
        ScheduleStepOptions,
        {**CLASSIFICATION, EPOCHS: ABOVE_0, **IN_STEPS},
    ),
)
