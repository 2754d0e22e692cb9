"""The keys of averaging, which both tasks have, and the rules that tie several of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import ABOVE_0, OFF, Options, option
from ssod_imwa.config.sections import Section
from ssod_imwa.errors import ConfigError


@dataclass(frozen=True)
class OuterOptions(Options):
    """IMWA.OUTER: the student's step at an episode's end, as DiLoCo and SlowMo take it."""

    lr: float = option(
        1.0,
        "share of the way from an episode's start to the average that the student goes; 1 goes to "
        "the average",
        above=0,
    )
    momentum: float = option(
        0.0, "share of the last such step that is added; 0 adds nothing", low=0, below=1
    )
    nesterov: bool = option(
        False, "Nesterov's form, which DiLoCo takes", when={"momentum": ABOVE_0}
    )


@dataclass(frozen=True)
class IMWAOptions(Options):
    """How many models are trained, and how they are averaged."""

    members: int = option(
        1, "M: models trained in each episode; 1 is plain training, the paper uses 2", low=1
    )
    episodes: int = option(
        1,
        "E: episodes; 1 with several members is vanilla model weight averaging, the paper uses 20",
        low=1,
    )
    start: float = option(
        0.0,
        "share of MAX_ITER that one member trains before members part, each of which goes on from "
        "there; 1 is plain training",
        low=0,
        high=1,
    )
    episode_lengths: Literal["uniform", "qsr"] = option(
        "uniform",
        'how long the E episodes are: alike, or by the quadratic synchronization rule "qsr", '
        "inversely proportional to the squared learning rate",
    )
    first_member: int = option(
        0,
        "number of the first member: MEMBERS 1, FIRST_MEMBER 3 trains member 3 of a larger run by "
        "itself",
        low=0,
    )
    parallel: bool = option(
        False,
        "train the members at once, each on its share of the processes (torchrun, --num-gpus), "
        "instead of in turn; the result is the same",
    )
    optimizer_state: Literal["keep", "average", "reset", "carry"] = option(
        "keep", 'what happens to momentum and moments; "keep": one per member, "carry": to the next'
    )
    bn: Literal["mean", "recompute", "keep"] = option(
        "mean",
        'BatchNorm statistics: "mean" of the members, "recompute" on BN_BATCHES batches, "keep" '
        "the last",
    )
    bn_batches: int = option(200, "batches on which BN recompute re-estimates statistics", low=1)
    nonfinite: Literal["raise", "drop"] = option(
        "raise", 'a member with NaN or Inf: "raise", or "drop" it and average the others'
    )
    accumulate: Literal["float64", "float32"] = option(
        "float64", "precision in which weights are added"
    )
    coefficients: list[float] = option(
        [], "weight of each member in the average, summing to 1; [] is 1/M each", low=0, high=1
    )
    outer: OuterOptions = OuterOptions()
    lawa: int = option(
        0,
        "k: at the end of the run, the mean of the last k averages (of one member, its states at "
        "ends of episodes) is evaluated and written beside the last one; 0 does not",
        low=0,
        free=True,
    )
    advise: int = option(
        0,
        "labeled images that are kept in memory, on which each average is compared with its "
        "members: says whether averaging pays (docs/when_averaging_helps.md); 0 does not, and one "
        "member has no average",
        low=0,
        free=True,
    )
    cross_teach: Literal["none", "other", "agree"] = option(
        "none",
        "in semi-supervised runs, from the second episode on: pseudo-labels come from the teacher "
        'that another member had at the last average ("other"), or are those of which it says the '
        'same ("agree"; docs/averaging.md)',
    )
    member_overrides: list[dict[str, Any]] = option(
        [],
        "for each member a block of the keys in which it differs, such as [{}, {SOLVER: {BASE_LR: "
        "0.02}}] (docs/averaging.md); [] is none",
    )


@dataclass(frozen=True)
class StoreOptions(Options):
    """IMWA: of members in turn alone."""

    store: Literal["dict", "stream"] = option(
        "dict", '"dict" keeps every finished member, "stream" one running mean of them'
    )
    store_device: Literal["same", "cpu"] = option(
        "same", 'where finished members wait: "same" as the model, "cpu" (pinned host memory)'
    )


SECTIONS = (
    Section("IMWA", IMWAOptions),
    Section("IMWA", StoreOptions, {"IMWA.PARALLEL": OFF}),
)


def members_at_once(cfg: CfgNode) -> int:
    """How many members are trained at the same time, each by its share of the processes."""
    return int(cfg.IMWA.MEMBERS) if cfg.IMWA.PARALLEL else 1


def common_iterations(share: float, iterations: int) -> int:
    """S, the own iterations of the common part: IMWA.START, a share, of T, rounded."""
    return round(share * iterations)


def most_episodes(cfg: CfgNode, iterations: int) -> int:
    """How many episodes, of at least one own iteration each, fit behind the common part.

    Where all is common part, there are none, and any number will do.
    """
    common = common_iterations(cfg.IMWA.START, iterations)
    return cfg.IMWA.EPISODES if 0 < iterations == common else iterations - common


def _check_episodes(cfg: CfgNode, source: str) -> None:
    solver, imwa = cfg.SOLVER, cfg.IMWA
    most = most_episodes(cfg, solver.MAX_ITER)
    if most < imwa.EPISODES:
        share = f" (1 - IMWA.START = {imwa.START:g})" if imwa.START else ""
        raise ConfigError(
            f"{source}: IMWA.EPISODES = {imwa.EPISODES} is not allowed "
            f"(must be 1..SOLVER.MAX_ITER{share} = {most})"
        )


def _check_parallel(cfg: CfgNode, source: str) -> None:
    solver, imwa = cfg.SOLVER, cfg.IMWA
    alone = imwa.MEMBERS == 1 or common_iterations(imwa.START, solver.MAX_ITER) == solver.MAX_ITER
    if imwa.PARALLEL and alone:
        raise ConfigError(
            f"{source}: IMWA.PARALLEL = True is not allowed with IMWA.MEMBERS = {imwa.MEMBERS} and "
            f"IMWA.START = {imwa.START:g} (must be False: no two members are trained)"
        )
    if imwa.PARALLEL and imwa.OPTIMIZER_STATE == "carry":
        raise ConfigError(
            f"{source}: IMWA.OPTIMIZER_STATE = 'carry' is not allowed with IMWA.PARALLEL (must be "
            "'keep', 'average' or 'reset': no member precedes another)"
        )


def _check_members(cfg: CfgNode, source: str) -> None:
    imwa = cfg.IMWA
    if imwa.CROSS_TEACH != "none" and 1 in (imwa.MEMBERS, imwa.EPISODES):
        raise ConfigError(
            f"{source}: IMWA.CROSS_TEACH = {imwa.CROSS_TEACH!r} is not allowed with IMWA.MEMBERS = "
            f"{imwa.MEMBERS} and IMWA.EPISODES = {imwa.EPISODES} (must be 'none' unless both are 2 "
            "or more: a member learns from another one's teacher of the episode before)"
        )
    if imwa.MEMBER_OVERRIDES and imwa.MEMBERS == 1:
        raise ConfigError(
            f"{source}: IMWA.MEMBER_OVERRIDES is not allowed with IMWA.MEMBERS = 1 (must be []: "
            "set the keys themselves)"
        )
    if imwa.MEMBER_OVERRIDES and len(imwa.MEMBER_OVERRIDES) != imwa.MEMBERS:
        raise ConfigError(
            f"{source}: IMWA.MEMBER_OVERRIDES has {len(imwa.MEMBER_OVERRIDES)} blocks for "
            f"IMWA.MEMBERS = {imwa.MEMBERS} (must be one a member, {{}} for one that differs in "
            "nothing, or no block)"
        )


def _check_state(cfg: CfgNode, source: str) -> None:
    solver, imwa = cfg.SOLVER, cfg.IMWA
    momenta = [block.get("SOLVER.MOMENTUM", solver.MOMENTUM) for block in imwa.MEMBER_OVERRIDES]
    # AdamW keeps its states with a beta of 0, too.
    averages_momenta = imwa.OPTIMIZER_STATE == "average" and solver.OPTIMIZER == "SGD"
    if averages_momenta and 0 in momenta and any(momenta):
        values = " and ".join(map(str, momenta))  # of a block as it is written, also 9e-1
        raise ConfigError(
            f"{source}: IMWA.OPTIMIZER_STATE = 'average' is not allowed with members whose "
            f"SOLVER.MOMENTUM is {values} (must be above 0 for all or for none)"
        )
    if imwa.NONFINITE == "drop" and imwa.OPTIMIZER_STATE == "carry":
        raise ConfigError(
            f"{source}: IMWA.NONFINITE = 'drop' is not allowed with IMWA.OPTIMIZER_STATE = 'carry' "
            "(must be 'raise': the next member would inherit a momentum that is not finite)"
        )


def _check_coefficients(cfg: CfgNode, source: str) -> None:
    imwa = cfg.IMWA
    if imwa.COEFFICIENTS and len(imwa.COEFFICIENTS) != imwa.MEMBERS:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS has {len(imwa.COEFFICIENTS)} values for IMWA.MEMBERS = "
            f"{imwa.MEMBERS} (must be one a member, or none for equal weights)"
        )
    if imwa.COEFFICIENTS and abs(sum(imwa.COEFFICIENTS) - 1) > 1e-6:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS sum to {sum(imwa.COEFFICIENTS):g} (must be 1 within 1e-6)"
        )


def check(cfg: CfgNode, source: str) -> None:
    """Rules that tie several keys of averaging together; `source` is named in their errors.

    Raises:
        ConfigError: a rule is broken; the message holds the values on both sides.
    """
    _check_episodes(cfg, source)
    _check_members(cfg, source)
    _check_state(cfg, source)
    _check_parallel(cfg, source)
    _check_coefficients(cfg, source)
