"""The keys that both tasks have, and the rules that tie several of them together.

Names are detectron2's wherever detectron2 has the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fvcore.common.config import CfgNode

from ssod_imwa.config import averaging
from ssod_imwa.config.options import Options, option, read_options
from ssod_imwa.config.sections import Section
from ssod_imwa.errors import ConfigError

ON = (True,)
# What SOLVER.STEPS and GAMMA belong to.
IN_STEPS = {"SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR",)}
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
    clip_type: Literal["norm", "value"] = option(
        "norm", "what is bounded: the norm, or each value", when={"enabled": ON}
    )
    clip_value: float = option(1.0, "the bound", above=0, when={"enabled": ON})


@dataclass(frozen=True)
class AMPOptions(Options):
    """SOLVER.AMP."""

    enabled: bool = option(False, "train in mixed precision")
    dtype: Literal["float16", "bfloat16"] = option(
        "float16", "of what is not kept in float32", when={"enabled": ON}
    )


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
    momentum: float = option(
        0.9, "SGD's momentum, AdamW's first beta", low=0, below=1, per_member=True
    )
    weight_decay: float = option(
        1e-4, "of all parameters but those of normalization layers", low=0, per_member=True
    )
    weight_decay_norm: float = option(
        0.0, "of the parameters of normalization layers", low=0, per_member=True
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
class AdamWOptions(Options):
    """SOLVER: of AdamW alone."""

    beta2: float = option(0.999, "AdamW's second beta", low=0, below=1)


@dataclass(frozen=True)
class StepOptions(Options):
    """SOLVER: of WarmupMultiStepLR alone."""

    steps: list[int] = option(
        [],
        "iterations (the member's own clock) after which the rate is multiplied by GAMMA",
        low=0,
        iterations=True,
    )
    gamma: float = option(0.1, "factor of the rate at each of STEPS", low=0)


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


SECTIONS = (
    Section("", RunOptions),
    Section("MODEL", DeviceOptions),
    Section("DATASETS", DatasetOptions),
    Section("DATALOADER", LoaderOptions),
    Section("SOLVER", SolverOptions),
    Section("SOLVER", SGDOptions, {"SOLVER.OPTIMIZER": ("SGD",)}, per_member=True),
    Section("SOLVER", AdamWOptions, {"SOLVER.OPTIMIZER": ("AdamW",)}, per_member=True),
    Section("SOLVER", StepOptions, IN_STEPS, per_member=True),
    Section(
        "SOLVER",
        PartOfCosineOptions,
        {"SOLVER.LR_SCHEDULER_NAME": ("WarmupPartOfCosineLR",)},
        per_member=True,
    ),
    Section("TEST", TestOptions),
    *averaging.SECTIONS,
)


def batch_sizes(cfg: CfgNode) -> dict[str, int]:
    """Images of an iteration in each stream that is read, by key."""
    return {
        f"SOLVER.{name}": images
        for name, images in cfg.SOLVER.items()
        if name.startswith(BATCH_PREFIX)
    }


def check_shared(cfg: CfgNode, source: str) -> None:
    """Rules that tie several shared keys together; `source` is named in their errors.

    Raises:
        ConfigError: a rule is broken; the message holds the values on both sides.
    """
    solver = cfg.SOLVER
    if not cfg.OUTPUT_DIR:  # an unset shell variable; Path("") is the current folder
        raise ConfigError(f"{source}: OUTPUT_DIR = '' is not allowed (must name a folder)")
    averaging.check(cfg, source)
    for key, images in batch_sizes(cfg).items():
        if images % solver.ACCUMULATION_STEPS:
            raise ConfigError(
                f"{source}: {key} = {images} is not allowed "
                f"(must be a multiple of SOLVER.ACCUMULATION_STEPS = {solver.ACCUMULATION_STEPS})"
            )
    steps = read_options(StepOptions, solver).steps
    if steps != sorted(set(steps)):
        raise ConfigError(f"{source}: SOLVER.STEPS = {steps} is not allowed (must increase)")
    if solver.get("NESTEROV") and not solver.MOMENTUM > 0:
        raise ConfigError(
            f"{source}: SOLVER.NESTEROV = True is not allowed with SOLVER.MOMENTUM = "
            f"{solver.MOMENTUM:g} (must be above 0)"
        )
