"""The methods by name, and the one of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification.extras.build import build_extras
from ssod_imwa.classification.generations import GenerationOptions
from ssod_imwa.classification.labelers.acr import ACR
from ssod_imwa.classification.labelers.alignment import Alignment
from ssod_imwa.classification.labelers.build import (
    StatisticsOptions,
    UnlabeledImages,
    build_labeler,
    check_queue,
)
from ssod_imwa.classification.labelers.darp import DARP
from ssod_imwa.classification.labelers.daso import DASO
from ssod_imwa.classification.losses.build import build_criterion
from ssod_imwa.classification.methods.base import EMAForm, Training
from ssod_imwa.classification.methods.bcl import BalancedContrastive, BCLNetwork, BCLOptions
from ssod_imwa.classification.methods.cossl import CoSSL, CoSSLNetwork, CoSSLOptions
from ssod_imwa.classification.methods.ecl import ECL, ECLOptions
from ssod_imwa.classification.methods.erm import EmpiricalRisk, ERMOptions, check_mixture
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.fixmatch import FixMatch, FixMatchOptions
from ssod_imwa.classification.methods.fixmatch_network import FixMatchNetwork
from ssod_imwa.classification.methods.mae import MaskedPretraining
from ssod_imwa.classification.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from ssod_imwa.classification.methods.moco import ExpertContrast, MoCoOptions
from ssod_imwa.classification.methods.ncl import NCL, NCLOptions
from ssod_imwa.classification.methods.paco import (
    GPaCo,
    GPaCoOptions,
    PaCo,
    PaCoOptions,
    ParametricNetwork,
)
from ssod_imwa.classification.mixers import MIXERS, Mixer, Network
from ssod_imwa.classification.models.build import ON_FEATURES
from ssod_imwa.classification.models.freezing import WITH_FROZEN_NORMS
from ssod_imwa.classification.models.mae import MAEOptions, MaskedAutoencoder
from ssod_imwa.classification.models.vit import ViT
from ssod_imwa.config.options import Options, Values, may_differ, option, read_options
from ssod_imwa.config.reader import value_of
from ssod_imwa.engine.method import Method
from ssod_imwa.errors import ConfigError, as_config_error

Counts = Sequence[int]
# Groups of keys that several methods read: a loss (CLS.LOSS), a mixer (CLS.MIX), several networks
# (CLS.MODEL.EXPERTS), a classifier that is trained and tested, in stages or with an EMA (CLS.STAGE,
# CLS.EMA_DECAY, ...), what only a second stage needs, and unlabeled images (CLS.UNLABELED,
# DATASETS.TRAIN_UNLABELED, ...).
Shared = Literal["loss", "mixer", "experts", "classifier", "second_stage", "unlabeled"]


@dataclass(frozen=True)
class Entry:
    """A method as configurations know it.

    Attributes:
        build: makes it of the configuration, its options, the network, the class counts, and the
            `UnlabeledImages` if it shares "unlabeled".
        options: type of those that are its own.
        prefix: of their keys.
        shares: groups of keys that it reads beside its own and those of all methods.
        when: further keys and the values at which its own options are read.
        moco_weight: last part of the key of MoCo's weight, at 0 of which there is no MoCo; "" for a
            method without.
    """

    build: Callable[..., Method]
    options: type[Options]
    prefix: str
    shares: tuple[Shared, ...] = ()
    when: Mapping[str, Values] = field(default_factory=dict)
    moco_weight: str = ""


def build_method(
    cfg: CfgNode, model: nn.Module, counts: Counts, unlabeled: UnlabeledImages | None = None
) -> Method:
    """The method of CLS.ALGORITHM around a network, which becomes (a part of) its student.

    Args:
        cfg: of the run, with the schedule in iterations.
        model: of `networks.build_model`, on its device.
        counts: training images of each class.
        unlabeled: images without labels, for methods that read them.

    Raises:
        ConfigError: a number of the method's is out of range, or the views are not what it reads.
    """
    name = cfg.CLS.ALGORITHM
    entry = METHODS[name]
    with as_config_error(f"CLS.ALGORITHM = {name!r}"):
        options = read_options(entry.options, value_of(cfg, entry.prefix))
        others = [unlabeled] if "unlabeled" in entry.shares else []
        method = entry.build(cfg, options, model, counts, *others)
    _check_views(cfg, method)
    if cfg.CLS.MODEL.COMPILE:
        method.parallel_student = _compiled(cfg, method)
    return method


def method_settings(cfg: CfgNode, method: Method, counts: Counts) -> dict[str, Any]:
    """What `Method.use` takes for a member with this configuration.

    Args:
        cfg: of the member, with the schedule in iterations.
        method: of the run.
        counts: training images of each class.

    Raises:
        ConfigError: parts do not go together, or the views are not what the method reads.
    """
    entry = METHODS[cfg.CLS.ALGORITHM]
    settings: dict[str, Any] = {}
    if may_differ(entry.options):
        settings["options"] = read_options(entry.options, value_of(cfg, entry.prefix))
    if "loss" in entry.shares:
        criterion = build_criterion(cfg, counts)
        settings["criterion"] = criterion.to(_device(method.student))
    if isinstance(method, EmpiricalRisk):
        settings["mixer"] = mixer = build_mixer(cfg, counts, method.student)
        _check_compiled(cfg, mixer)
        with as_config_error("CLS.MIX"):
            check_mixture(mixer, criterion)
    if isinstance(method, FixMatch):
        kind = type(method.labeler).options_class
        settings["labeler.options"] = read_options(kind, cfg.CLS.LABELER)
    _check_views(cfg, method)
    return settings


def _check_views(cfg: CfgNode, method: Method) -> None:
    keys = {"labeled": "VIEWS", "unlabeled": "UNLABELED_VIEWS"}
    for stream, key in keys.items():
        names = method.reads.get(stream, ())
        transforms = cfg.CLS.INPUT[key] if names else ()
        if len(transforms) != len(names):
            raise ConfigError(
                f"CLS.INPUT.{key} = {transforms} is not allowed with CLS.ALGORITHM = "
                f"{cfg.CLS.ALGORITHM!r} (must be {len(names)}: {', '.join(names)})"
            )


@dataclass(frozen=True)
class CompileOptions(Options):
    """How training steps call the network."""

    compile: Literal["", "default", "reduce-overhead", "max-autotune"] = option(
        "",
        "torch.compile's mode for training steps: none, or with CUDA graphs (reduce-overhead); "
        "needs a C++ compiler and half a minute, and rounds differently",
    )


def _compiled(cfg: CfgNode, method: Method) -> Any:
    """The student as training steps call it; what is evaluated and saved stays the plain module."""
    mode, student = cfg.CLS.MODEL.COMPILE, method.student
    if isinstance(method, EmpiricalRisk):
        _check_compiled(cfg, method.mixer)
    try:
        # Nothing is compiled before its first call: better to fail here than in the first step.
        torch.compile(torch.neg)(torch.ones(1, device=next(student.parameters()).device))
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"CLS.MODEL.COMPILE = {mode!r}: nothing can be compiled here ({first})"
        ) from error
    return torch.compile(student, mode=mode)


def _check_compiled(cfg: CfgNode, mixer: Mixer) -> None:
    if cfg.CLS.MODEL.COMPILE and mixer.mixes_features:
        raise ConfigError(
            f"CLS.MODEL.COMPILE = {cfg.CLS.MODEL.COMPILE!r} is not allowed with CLS.MIX.KIND = "
            f"{mixer.name!r} (must be '': a compiled network does not see what is mixed inside it)"
        )


def method_name(cfg: CfgNode) -> str:
    """The method in short, as results name it: "cross_entropy + mfw + drw", "ecl"."""
    options = cfg.CLS
    if options.ALGORITHM in ("fixmatch", "mean_teacher", "cossl"):
        return _semi_supervised_name(cfg)
    if options.ALGORITHM != "erm":
        return options.ALGORITHM
    parts = [options.LOSS.NAME]
    if options.MIX.KIND != "none":
        parts.append(options.MIX.KIND)
    if "WEIGHTS" in options.LOSS and options.LOSS.WEIGHTS != "none":
        parts.append("drw" if options.LOSS.WEIGHTS_FROM > 0 else options.LOSS.WEIGHTS)
    if options.SAMPLER.NAME != "instance":
        parts.append(f"{options.SAMPLER.NAME} sampling")
    if options.STAGE.TAU_NORM:
        parts.append(f"tau-norm {options.STAGE.TAU_NORM:g}")
    if options.STAGE.PART != "all":
        parts.append(f"{options.STAGE.PART} alone")
    return " + ".join(parts)


def _semi_supervised_name(cfg: CfgNode) -> str:
    """Such as "fixmatch + la + daso", "fixmatch + abc", "acr"."""
    options = cfg.CLS
    is_fixmatch = options.ALGORITHM == "fixmatch"
    is_acr = is_fixmatch and ACR.name == options.LABELER.NAME
    parts = [ACR.name if is_acr else options.ALGORITHM]
    if options.LOSS.NAME != "cross_entropy":
        parts.append("la" if options.LOSS.NAME == "balanced_softmax" else options.LOSS.NAME)
    if is_fixmatch and options.FIXMATCH.SECOND_HEAD == "abc":
        parts.append("abc")
    generations = read_options(GenerationOptions, options.get("CREST")).generations
    is_aligned = is_fixmatch and Alignment.name == options.LABELER.NAME
    if generations > 1:
        parts.append("crest+" if is_aligned else "crest")
    elif is_aligned:
        parts.append(Alignment.name)
    if is_fixmatch and options.LABELER.NAME in (DARP.name, DASO.name):
        parts.append(options.LABELER.NAME)
    return " + ".join(parts)


def build_mixer(cfg: CfgNode, counts: Sequence[int], model: Network) -> Mixer:
    """The mixing of CLS.MIX in a network."""
    mixer = MIXERS[cfg.CLS.MIX.KIND]
    if mixer.cuts_pixels and (name := cfg.CLS.MODEL.NAME) in ON_FEATURES:
        raise ConfigError(
            f"CLS.MIX.KIND = {mixer.name!r} is not allowed with CLS.MODEL.NAME = {name!r} "
            "(must be a mixing without boxes: features have no pixels)"
        )
    with as_config_error("CLS.MIX"):
        return mixer(counts, read_options(mixer.options_class, cfg.CLS.MIX), model)


def build_autoencoder(cfg: CfgNode, model: nn.Module) -> MaskedAutoencoder:
    """The masked autoencoder around a vision transformer."""
    if not isinstance(model, ViT):
        raise ConfigError(
            f"CLS.MODEL.NAME = {cfg.CLS.MODEL.NAME!r} is not allowed with CLS.ALGORITHM = 'mae' "
            "(must be a vision transformer: vit_base_patch16, vit_tiny_patch4_32)"
        )
    with as_config_error("CLS.MAE"):
        return MaskedAutoencoder(model, read_options(MAEOptions, cfg.CLS.MAE))


def _erm(cfg: CfgNode, options: ERMOptions, model: Any, counts: Counts) -> Method:
    criterion, mixer = build_criterion(cfg, counts), build_mixer(cfg, counts, model)
    return EmpiricalRisk(model, criterion, options, training=_training(cfg), mixer=mixer)


def _bcl(cfg: CfgNode, options: BCLOptions, model: Any, counts: Counts) -> Method:
    network = BCLNetwork(model, options).to(_device(model))
    return BalancedContrastive(network, counts, options, training=_training(cfg))


def _paco(cfg: CfgNode, options: PaCoOptions, model: Any, counts: Counts) -> Method:
    check_queue(cfg, "CLS.PACO.QUEUE")
    network = ParametricNetwork(model, options, head="paco").to(_device(model))
    return PaCo(network, counts, options, training=_training(cfg), seed=cfg.SEED)


def _gpaco(cfg: CfgNode, options: GPaCoOptions, model: Any, counts: Counts) -> Method:
    check_queue(cfg, "CLS.PACO.QUEUE")
    network = ParametricNetwork(model, options, head="gpaco").to(_device(model))
    return GPaCo(network, counts, options, training=_training(cfg), seed=cfg.SEED)


def _ncl(cfg: CfgNode, options: NCLOptions, model: Any, counts: Counts) -> Method:
    contrastive = options.contrastive_weight > 0
    network, contrast = _experts(cfg, model, contrastive=contrastive, reference=False)
    return NCL(network, counts, options, training=_training(cfg), contrast=contrast)


def _ecl(cfg: CfgNode, options: ECLOptions, model: Any, counts: Counts) -> Method:
    network, contrast = _experts(cfg, model, contrastive=options.beta > 0, reference=True)
    return ECL(network, counts, options, training=_training(cfg), contrast=contrast)


def _experts(
    cfg: CfgNode, model: Any, *, contrastive: bool, reference: bool
) -> tuple[CollaborativeNetwork, ExpertContrast | None]:
    if contrastive:
        check_queue(cfg, "CLS.MOCO.QUEUE")
    options = read_options(MoCoOptions, cfg.CLS.get("MOCO"))
    width = options.width if contrastive else 0
    network = CollaborativeNetwork(model, reference=reference, width=width).to(_device(model))
    return network, ExpertContrast(network, options, seed=cfg.SEED) if contrastive else None


def _mae(cfg: CfgNode, options: MAEOptions, model: nn.Module, counts: Counts) -> Method:
    return MaskedPretraining(build_autoencoder(cfg, model).to(_device(model)))


def _fixmatch(
    cfg: CfgNode, options: FixMatchOptions, model: Any, counts: Counts, unlabeled: UnlabeledImages
) -> Method:
    device = _device(model)
    network = FixMatchNetwork(model, two_heads=options.second_head != "none").to(device)
    labeler = build_labeler(cfg, model, unlabeled)
    statistics = read_options(StatisticsOptions, cfg.CLS.FIXMATCH).statistics
    return FixMatch(
        network,
        build_criterion(cfg, counts),
        options,
        training=_training(cfg),
        labeler=labeler,
        averages_statistics=statistics == "averaged",
        extras=build_extras(cfg, labeler, counts, device),
        knows_truth=unlabeled.knows_truth,
    )


def _cossl(
    cfg: CfgNode, options: CoSSLOptions, model: Any, counts: Counts, unlabeled: UnlabeledImages
) -> Method:
    return CoSSL(
        *(CoSSLNetwork(model).to(_device(model)), counts, build_criterion(cfg, counts), options),
        training=_training(cfg),
        knows_truth=unlabeled.knows_truth,
    )


def _mean_teacher(
    cfg: CfgNode,
    options: MeanTeacherOptions,
    model: Any,
    counts: Counts,
    unlabeled: UnlabeledImages,
) -> Method:
    return MeanTeacher(
        *(model, build_criterion(cfg, counts), options),
        training=_training(cfg),
        knows_truth=unlabeled.knows_truth,
    )


def _training(cfg: CfgNode) -> Training:
    """What all methods with a classifier are told."""
    return Training(
        cfg.SOLVER.MAX_ITER,
        part=cfg.CLS.STAGE.PART,
        ema_decay=cfg.CLS.EMA_DECAY,
        ema_form=read_options(EMAForm, cfg.CLS),
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


METHODS: dict[str, Entry] = {
    "erm": Entry(
        *(_erm, ERMOptions, "CLS.STAGE"),
        shares=("loss", "mixer", "experts", "classifier", "second_stage"),
        when={"CLS.STAGE.PART": WITH_FROZEN_NORMS},
    ),
    "bcl": Entry(_bcl, BCLOptions, "CLS.BCL", shares=("classifier",)),
    "paco": Entry(_paco, PaCoOptions, "CLS.PACO", shares=("classifier",)),
    "gpaco": Entry(_gpaco, GPaCoOptions, "CLS.PACO", shares=("classifier",)),
    "ncl": Entry(
        *(_ncl, NCLOptions, "CLS.NCL"),
        shares=("classifier", "experts"),
        moco_weight="CONTRASTIVE_WEIGHT",
    ),
    "ecl": Entry(
        *(_ecl, ECLOptions, "CLS.ECL"),
        shares=("classifier", "experts"),
        moco_weight="BETA",
    ),
    "mae": Entry(_mae, MAEOptions, "CLS.MAE"),
    "fixmatch": Entry(
        _fixmatch, FixMatchOptions, "CLS.FIXMATCH", shares=("loss", "classifier", "unlabeled")
    ),
    "cossl": Entry(_cossl, CoSSLOptions, "CLS.COSSL", shares=("loss", "classifier", "unlabeled")),
    "mean_teacher": Entry(
        *(_mean_teacher, MeanTeacherOptions, "CLS.MEAN_TEACHER"),
        shares=("loss", "classifier", "unlabeled"),
    ),
}


@dataclass(frozen=True)
class MethodChoice(Options):
    """The method; most other keys belong to some."""

    algorithm: str = option(
        "erm",
        'how is trained: "erm" is one loss on one view (LOSS, MIX, STAGE say which)',
        choices=tuple(METHODS),
    )
