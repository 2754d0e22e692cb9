"""The keys that both tasks have, and the rules that tie several of them together.

Names are detectron2's wherever detectron2 has the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import ABOVE_0, OFF, Options, Section, option
from ssod_imwa.errors import ConfigError

# Images of an iteration, by stream: IMS_PER_BATCH, IMS_PER_BATCH_UNLABELED.
BATCH_PREFIX = "IMS_PER_BATCH"


@dataclass(frozen=True)
class RunOptions(Options):
    """What is trained, and where it goes."""

    task: Literal["detection", "classification"] = option("detection", "what is trained")
    output_dir: str = option(
        "./output",
        "folder of checkpoints, metrics, results and pictures; recipes without one are named after "
        "their files",
        free=True,
    )
    seed: int = option(
        1,
        "of initial weights, data order and augmentation: every random number is a function of it",
        low=0,
        high=2**63 - 1,
    )
    log_period: int = option(
        20, "global steps between two lines of the log and of metrics.json", low=1, free=True
    )


@dataclass(frozen=True)
class DeviceOptions(Options):
    """Where a model computes."""

    device: str = option(
        "auto", '"auto" (a GPU if there is one), "cpu", "cuda", "cuda:N"', free=True
    )


@dataclass(frozen=True)
class DatasetOptions(Options):
    """What is trained and tested on, by names as docs/datasets.md has them."""

    root: str = option(
        "", 'folder of all data sets; "" takes $DETECTRON2_DATASETS, else ./datasets', free=True
    )
    import_: list[str] = option([], "Python modules to import first, which may register data sets")
    train: list[str] = option([], "labeled data sets to train on")
    test: list[str] = option([], "data sets to test on")
    on_bad_record: Literal["error", "skip"] = option(
        "error",
        "a broken training record (no image, a box without area, ...) stops the run, or is dropped "
        "or replaced and said",
    )


@dataclass(frozen=True)
class LoaderOptions(Options):
    """How images are read."""

    num_workers: int = option(
        2, "processes that read and augment images; results do not depend on it", low=0, free=True
    )


@dataclass(frozen=True)
class ClipOptions(Options):
    """SOLVER.CLIP_GRADIENTS."""

    enabled: bool = option(False, "bound gradients before each step")
    clip_type: Literal["norm", "value"] = option("norm", "what is bounded: the norm, or each value")
    clip_value: float = option(1.0, "the bound", low=0)


@dataclass(frozen=True)
class AMPOptions(Options):
    """SOLVER.AMP."""

    enabled: bool = option(False, "train in mixed precision")
    dtype: Literal["float16", "bfloat16"] = option("float16", "of what is not kept in float32")


@dataclass(frozen=True)
class SolverOptions(Options):
    """How long, in what steps and at which rate a member is trained."""

    max_iter: int = option(
        180000,
        "T of the paper: iterations (optimizer steps) of one member over the whole run",
        low=1,
        iterations=True,
    )
    ims_per_batch: int = option(16, "labeled images of an iteration, over all GPUs", low=1)
    accumulation_steps: int = option(
        1, "parts in which a batch is processed, whose gradients add up; saves memory", low=1
    )
    optimizer: Literal["SGD", "AdamW"] = option("SGD", "the optimizer")
    base_lr: float = option(0.01, "learning rate after warm-up", low=0, per_member=True)
    momentum: float = option(0.9, "SGD's momentum, AdamW's first beta", per_member=True)
    beta2: float = option(0.999, "AdamW's second beta", low=0, high=1, per_member=True)
    weight_decay: float = option(
        1e-4, "of all parameters but those of normalization layers", per_member=True
    )
    weight_decay_norm: float = option(
        0.0, "of the parameters of normalization layers", per_member=True
    )
    decay_biases: bool = option(
        True, "whether WEIGHT_DECAY holds for biases, too; ACR and FixMatch leave them out"
    )
    lr_scheduler_name: Literal[
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupThenCosineLR", "WarmupPartOfCosineLR"
    ] = option(
        "WarmupMultiStepLR",
        "how the rate falls: in STEPS, as a half cosine to 0 that begins with the run or (Then) "
        "after the warm-up, or as COSINE_CYCLES of a cosine",
        per_member=True,
    )
    steps: list[int] = option(
        [],
        "iterations (the member's own clock) after which the rate is multiplied by GAMMA",
        low=0,
        iterations=True,
        per_member=True,
    )
    gamma: float = option(0.1, "factor of the rate at each of STEPS", per_member=True)
    warmup_iters: int = option(
        1000,
        "iterations in which the rate rises to BASE_LR",
        low=0,
        iterations=True,
        per_member=True,
    )
    warmup_factor: float = option(
        0.001, "share of the rate that warm-up begins with", low=0, high=1, per_member=True
    )
    clip_gradients: ClipOptions = ClipOptions()
    amp: AMPOptions = AMPOptions()
    checkpoint_period: int = option(
        0,
        "global steps between checkpoints besides those at ends of episodes; 0 writes only those",
        low=0,
        free=True,
    )
    checkpoint_episodes: int = option(
        1,
        "episodes between two checkpoints at an episode's end; more where episodes are very short",
        low=1,
        free=True,
    )
    checkpoint_keep: int = option(1, "older resume files kept beside the newest", low=1, free=True)


@dataclass(frozen=True)
class SGDOptions(Options):
    """SOLVER: of SGD alone."""

    nesterov: bool = option(False, "Nesterov's momentum, which needs a MOMENTUM above 0")


@dataclass(frozen=True)
class PartOfCosineOptions(Options):
    """SOLVER: of WarmupPartOfCosineLR alone."""

    cosine_cycles: float = option(
        0.21875,
        "c, the rate is BASE_LR cos(2 pi c t / T); the default 7/32 is FixMatch's cos(7 pi t / 16 "
        "T), CREST's cos(pi t / 16 T) is 1/32",
        low=0,
        high=0.25,
    )


@dataclass(frozen=True)
class TestOptions(Options):
    """When and how models are evaluated."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    eval_period: int = option(
        0,
        "a member's own iterations between two evaluations of its student and teacher; 0: none "
        "inside an episode",
        low=0,
        iterations=True,
        free=True,
    )
    eval_episodes: int = option(
        1,
        "episodes between two evaluations of the averaged models; the last is always evaluated, 0: "
        "only it",
        low=0,
        free=True,
    )
    eval_members: bool = option(
        False, "evaluate each member, too, before it is averaged", free=True
    )
    ims_per_batch: int = option(8, "images that are evaluated at once", low=1, free=True)


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
    Section("", RunOptions),
    Section("MODEL", DeviceOptions),
    Section("DATASETS", DatasetOptions),
    Section("DATALOADER", LoaderOptions),
    Section("SOLVER", SolverOptions),
    Section("SOLVER", SGDOptions, {"SOLVER.OPTIMIZER": ("SGD",)}, per_member=True),
    Section(
        "SOLVER",
        PartOfCosineOptions,
        {"SOLVER.LR_SCHEDULER_NAME": ("WarmupPartOfCosineLR",)},
        per_member=True,
    ),
    Section("TEST", TestOptions),
    Section("IMWA", IMWAOptions),
    Section("IMWA", StoreOptions, {"IMWA.PARALLEL": OFF}),
)


def members_at_once(cfg: CfgNode) -> int:
    """How many members are trained at the same time, each by its share of the processes."""
    return int(cfg.IMWA.MEMBERS) if cfg.IMWA.PARALLEL else 1


def batch_sizes(cfg: CfgNode) -> dict[str, int]:
    """Images of an iteration in each stream that is read, by key."""
    return {
        f"SOLVER.{name}": images
        for name, images in cfg.SOLVER.items()
        if name.startswith(BATCH_PREFIX)
    }


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


def check_shared(cfg: CfgNode, source: str) -> None:
    """Rules that tie several shared keys together; `source` is named in their errors.

    Raises:
        ConfigError: a rule is broken; the message holds the values on both sides.
    """
    solver, imwa = cfg.SOLVER, cfg.IMWA
    if not cfg.OUTPUT_DIR:  # an unset shell variable; Path("") is the current folder
        raise ConfigError(f"{source}: OUTPUT_DIR = '' is not allowed (must name a folder)")
    _check_episodes(cfg, source)
    for key, images in batch_sizes(cfg).items():
        if images % solver.ACCUMULATION_STEPS:
            raise ConfigError(
                f"{source}: {key} = {images} is not allowed "
                f"(must be a multiple of SOLVER.ACCUMULATION_STEPS = {solver.ACCUMULATION_STEPS})"
            )
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise ConfigError(
            f"{source}: SOLVER.STEPS = {list(solver.STEPS)} is not allowed (must increase)"
        )
    if solver.get("NESTEROV") and not solver.MOMENTUM > 0:
        raise ConfigError(
            f"{source}: SOLVER.NESTEROV = True is not allowed with SOLVER.MOMENTUM = "
            f"{solver.MOMENTUM:g} (must be above 0)"
        )
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
    _check_parallel(cfg, source)
    if imwa.COEFFICIENTS and len(imwa.COEFFICIENTS) != imwa.MEMBERS:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS has {len(imwa.COEFFICIENTS)} values for IMWA.MEMBERS = "
            f"{imwa.MEMBERS} (must be one a member, or none for equal weights)"
        )
    if imwa.COEFFICIENTS and abs(sum(imwa.COEFFICIENTS) - 1) > 1e-6:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS sum to {sum(imwa.COEFFICIENTS):g} (must be 1 within 1e-6)"
        )
