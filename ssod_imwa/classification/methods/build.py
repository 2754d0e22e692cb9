"""From a configuration to the method of a classification run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification.losses.build import build_criterion
from ssod_imwa.classification.methods.bcl import BalancedContrastive, BCLNetwork
from ssod_imwa.classification.methods.ecl import ECL
from ssod_imwa.classification.methods.erm import EmpiricalRisk
from ssod_imwa.classification.methods.expert_network import CollaborativeNetwork
from ssod_imwa.classification.methods.mae import MaskedPretraining
from ssod_imwa.classification.methods.moco import ExpertContrast
from ssod_imwa.classification.methods.ncl import NCL
from ssod_imwa.classification.methods.paco import GPaCo, PaCo, ParametricNetwork
from ssod_imwa.classification.mixers import MIXERS, Mixer
from ssod_imwa.classification.models.mae import MaskedAutoencoder
from ssod_imwa.classification.models.vit import ViT
from ssod_imwa.config.options import read_options
from ssod_imwa.engine.method import Method
from ssod_imwa.errors import ConfigError

Counts = Sequence[int]


def build_method(cfg: CfgNode, model: nn.Module, counts: Counts) -> Method:
    """The method of CLS.ALGORITHM around a network, which becomes (a part of) its student.

    Args:
        cfg: of the run, with the schedule in iterations.
        model: of `build.build_model`, on its device.
        counts: training images of each class.

    Raises:
        ConfigError: a number of the method's is out of range, or the views are not what it reads.
    """
    name = cfg.CLS.ALGORITHM
    device = next(model.parameters()).device
    try:
        method = _METHODS[name](cfg, model, counts, device)
    except ValueError as error:
        raise ConfigError(f"CLS.{name.upper()}: {error}") from error
    names = cfg.CLS.INPUT.VIEWS
    if len(names) != method.num_views:
        raise ConfigError(
            f"CLS.INPUT.VIEWS = {names} is not allowed with CLS.ALGORITHM = {name!r} "
            f"(must be {method.num_views})"
        )
    if cfg.CLS.MODEL.COMPILE:
        method.parallel_student = _compiled(cfg, method.student, device)
    return method


def _compiled(cfg: CfgNode, student: nn.Module, device: torch.device) -> nn.Module:
    """The student as training steps call it; what is evaluated and saved stays the plain module."""
    mode, mix = cfg.CLS.MODEL.COMPILE, cfg.CLS.MIX.KIND
    if cfg.CLS.ALGORITHM == "erm" and MIXERS[mix].mixes_features:
        raise ConfigError(
            f"CLS.MODEL.COMPILE = {mode!r} is not allowed with CLS.MIX.KIND = {mix!r} (must be '': "
            "a compiled network does not see what is mixed inside it)"
        )
    try:
        # Nothing is compiled before its first call: better to fail here than in the first step.
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"CLS.MODEL.COMPILE = {mode!r}: nothing can be compiled here ({first})"
        ) from error
    return torch.compile(student, mode=mode)


def method_name(cfg: CfgNode) -> str:
    """The method in short, as results name it: "cross_entropy + mfw + drw", "ecl"."""
    options = cfg.CLS
    if options.ALGORITHM != "erm":
        return options.ALGORITHM
    parts = [options.LOSS.NAME]
    if options.MIX.KIND != "none":
        parts.append(options.MIX.KIND)
    if options.LOSS.WEIGHTS != "none":
        parts.append("drw" if options.LOSS.WEIGHTS_FROM > 0 else options.LOSS.WEIGHTS)
    if options.SAMPLER.NAME != "instance":
        parts.append(f"{options.SAMPLER.NAME} sampling")
    if options.STAGE.TAU_NORM:
        parts.append(f"tau-norm {options.STAGE.TAU_NORM:g}")
    if options.STAGE.PART != "all":
        parts.append(f"{options.STAGE.PART} alone")
    return " + ".join(parts)


def build_mixer(cfg: CfgNode, counts: Sequence[int], model: nn.Module) -> Mixer:
    """The mixing of CLS.MIX in a network."""
    mixer = MIXERS[cfg.CLS.MIX.KIND]
    try:
        return mixer(counts, read_options(mixer.options_class, cfg.CLS.MIX), model)
    except ValueError as error:
        raise ConfigError(f"CLS.MIX: {error}") from error


def _erm(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    return EmpiricalRisk(
        model,
        build_criterion(cfg, counts),
        mixer=build_mixer(cfg, counts, model),
        part=cfg.CLS.STAGE.PART,
        move_statistics=cfg.CLS.STAGE.MOVE_STATISTICS,
        **_common(cfg),
    )


def _bcl(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    options = cfg.CLS.BCL
    return BalancedContrastive(
        BCLNetwork(model, hidden=options.HIDDEN, width=options.WIDTH).to(device),
        counts,
        temperature=options.TEMPERATURE,
        ce_weight=options.CE_WEIGHT,
        contrastive_weight=options.CONTRASTIVE_WEIGHT,
        part=cfg.CLS.STAGE.PART,
        **_common(cfg),
    )


def _paco(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    options, head = cfg.CLS.PACO, cfg.CLS.ALGORITHM
    network = ParametricNetwork(
        model, head=head, hidden=options.HIDDEN or None, width=options.WIDTH
    ).to(device)
    common = {
        "alpha": options.ALPHA,
        "temperature": options.TEMPERATURE,
        "queue": options.QUEUE,
        "part": cfg.CLS.STAGE.PART,
        "seed": cfg.SEED,
        **_common(cfg),
    }
    if head == "gpaco":
        return GPaCo(network, counts, **common)
    return PaCo(network, counts, momentum=options.MOMENTUM, **common)


def _ncl(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    options = cfg.CLS.NCL
    network, contrast = _experts(
        cfg, model, device, contrastive=options.CONTRASTIVE_WEIGHT > 0, reference=False
    )
    return NCL(
        network,
        counts,
        hard_categories=options.HARD_CATEGORIES or None,
        distillation_weight=options.DISTILLATION_WEIGHT,
        contrastive_weight=options.CONTRASTIVE_WEIGHT,
        contrast=contrast,
        part=cfg.CLS.STAGE.PART,
        **_common(cfg),
    )


def _ecl(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    options = cfg.CLS.ECL
    network, contrast = _experts(cfg, model, device, contrastive=options.BETA > 0, reference=True)
    return ECL(
        network,
        counts,
        alpha=options.ALPHA,
        beta=options.BETA,
        distil=options.DISTIL,
        temperature=options.TEMPERATURE,
        transfer=options.TRANSFER,
        transfer_clip=options.TRANSFER_CLIP or None,
        compensated=options.COMPENSATED,
        contrast=contrast,
        part=cfg.CLS.STAGE.PART,
        **_common(cfg),
    )


def _experts(
    cfg: CfgNode, model: nn.Module, device: Any, *, contrastive: bool, reference: bool
) -> tuple[CollaborativeNetwork, ExpertContrast | None]:
    options = cfg.CLS.MOCO
    width = options.WIDTH if contrastive else 0
    network = CollaborativeNetwork(model, reference=reference, width=width).to(device)
    if not contrastive:
        return network, None
    return network, ExpertContrast(
        network,
        queue=options.QUEUE,
        temperature=options.TEMPERATURE,
        momentum=options.MOMENTUM,
        legacy_key_head=options.LEGACY_KEY_HEAD,
        seed=cfg.SEED,
    )


def _mae(cfg: CfgNode, model: nn.Module, counts: Counts, device: Any) -> Method:
    if cfg.CLS.EMA_DECAY:
        raise ValueError(f"CLS.EMA_DECAY = {cfg.CLS.EMA_DECAY:g} is not allowed (must be 0)")
    return MaskedPretraining(build_autoencoder(cfg, model).to(device))


def build_autoencoder(cfg: CfgNode, model: nn.Module) -> MaskedAutoencoder:
    """The masked autoencoder around a vision transformer."""
    options = cfg.CLS.MAE
    if not isinstance(model, ViT):
        raise ConfigError(
            f"CLS.MODEL.NAME = {cfg.CLS.MODEL.NAME!r} is not allowed with CLS.ALGORITHM = 'mae' "
            "(must be a vision transformer: vit_base_patch16, vit_tiny_patch4_32)"
        )
    try:
        return MaskedAutoencoder(
            model,
            decoder_dim=options.DECODER_WIDTH,
            decoder_depth=options.DECODER_DEPTH,
            decoder_heads=options.DECODER_HEADS,
            mask_ratio=options.MASK_RATIO,
        )
    except ValueError as error:
        raise ConfigError(f"CLS.MAE: {error}") from error


def _common(cfg: CfgNode) -> dict[str, Any]:
    return {"iterations": cfg.SOLVER.MAX_ITER, "ema_decay": cfg.CLS.EMA_DECAY}


_METHODS: dict[str, Callable[[CfgNode, nn.Module, Counts, Any], Method]] = {
    "erm": _erm,
    "bcl": _bcl,
    "paco": _paco,
    "gpaco": _paco,
    "ncl": _ncl,
    "ecl": _ecl,
    "mae": _mae,
}
