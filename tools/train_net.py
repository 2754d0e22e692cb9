#!/usr/bin/env python
"""Train or evaluate what a YAML configuration describes.

Examples:
  train                       %(prog)s --config-file configs/digits/unbiased_teacher_imwa.yaml
  several files, left to right
      %(prog)s --config-file configs/coco/unbiased_teacher.yaml configs/coco/10pct.yaml
  change settings             %(prog)s --config-file FILE SOLVER.MAX_ITER 1200 OUTPUT_DIR out/long
  go on after an interruption %(prog)s --config-file FILE --resume
  evaluate the trained model  %(prog)s --config-file FILE --eval-only
  four GPUs                   %(prog)s --config-file FILE --num-gpus 4
  two members at once, each on two of four GPUs
      %(prog)s --config-file FILE --num-gpus 4 IMWA.MEMBERS 2 IMWA.PARALLEL True
  a smaller batch, with rate, schedule and teacher as it needs them
                              %(prog)s --config-file FILE --scale-batch 4

OUTPUT_DIR receives results.json (figures of every evaluation), metrics.json and TensorBoard events
(curves), model_final.pth (averaged student and teacher), model_lawa.pth with IMWA.LAWA,
config.yaml, and the newest checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from contextlib import suppress
from typing import Any

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.cli import log_to_stderr, print_table, run_main, split_config_file
from ssod_imwa.config.averaging import members_at_once
from ssod_imwa.engine.launch import launch
from ssod_imwa.errors import one_line
from ssod_imwa.runs.batch_scale import Change, scale_batch
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.generations import all_generations
from ssod_imwa.runs.progress import stopped_line
from ssod_imwa.runs.results import main_metrics, read_results
from ssod_imwa.runs.run import evaluate, train
from ssod_imwa.visualization.table import results_table

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        required=True,
        nargs="+",
        metavar="FILE",
        help="YAML files, merged left to right; KEY VALUE may follow",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--resume",
        action="store_true",
        help="continue from OUTPUT_DIR's newest intact checkpoint; starts anew if there is none",
    )
    action.add_argument("--resume-from", metavar="CHECKPOINT", help="continue from this one")
    action.add_argument(
        "--overwrite", action="store_true", help="replace the run that OUTPUT_DIR holds"
    )
    action.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate OUTPUT_DIR's model, or MODEL.WEIGHTS if given here",
    )
    parser.add_argument(
        "--allow-inexact-resume",
        action="store_true",
        help="resume although settings changed; the fact is kept in later checkpoints",
    )
    parser.add_argument(
        "--scale-batch",
        type=int,
        metavar="N",
        help="labeled images an iteration; rate, iterations, EMA decays, unlabeled images follow",
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="settings that override the files'"
    )
    arguments = parser.parse_intermixed_args()
    check_arguments(parser, arguments)
    arguments.config_file, arguments.overrides = split_config_file(
        arguments.config_file, arguments.overrides
    )
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what argparse does not."""
    if arguments.resume_from == "":  # an unset shell variable, which would start anew
        parser.error("--resume-from '' is not allowed (must name a checkpoint)")
    if arguments.allow_inexact_resume and not (arguments.resume or arguments.resume_from):
        parser.error("--allow-inexact-resume is of --resume or --resume-from, and none is given")


def read_configuration(arguments: argparse.Namespace) -> tuple[Any, list[Change]]:
    """The configuration, and what --scale-batch changed in it."""
    cfg = load_config(arguments.config_file, arguments.overrides)
    return (cfg, []) if arguments.scale_batch is None else scale_batch(cfg, arguments.scale_batch)


def work(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """What each process does."""
    log_to_stderr(logging.INFO if ranks.run.is_main else logging.ERROR)
    cfg, changes = read_configuration(arguments)
    for change in changes:
        logger.info("--scale-batch: %s %s -> %s", change.key, change.before, change.after)
    if arguments.eval_only:
        # The file's MODEL.WEIGHTS are what training starts from.
        named = "MODEL.WEIGHTS" in arguments.overrides[::2]
        metrics = evaluate(cfg, cfg.MODEL.WEIGHTS if named else None, ranks=ranks)
        if ranks.run.is_main:
            for name, value in metrics.items():
                print(f"{one_line(name):>16} {value:6.2f}")
        return 0
    status = train(
        cfg,
        ranks,
        resume_from=arguments.resume_from or arguments.resume,
        overwrite=arguments.overwrite,
        allow_inexact=arguments.allow_inexact_resume,
    )
    if status > 128 and ranks.run.is_main:
        outputs = [own.OUTPUT_DIR for own in all_generations(cfg)]
        line = stopped_line(outputs, arguments.resume_command)
        with suppress(OSError):  # the terminal is gone
            print(line, file=sys.stderr, flush=True)
    if status == 0 and ranks.run.is_main:
        results = read_results(cfg.OUTPUT_DIR)
        columns = [name for name in main_metrics([results]) if "VOC/" not in name]
        print_table(results_table(results, metrics=columns))
        print(f"all figures, curves and models are in {cfg.OUTPUT_DIR}")
    return status


def resume_command(arguments: argparse.Namespace) -> str:
    """The command that goes on with what these arguments started, in the same folder."""
    if "LOCAL_WORLD_SIZE" in os.environ:  # a torchrun agent, whose own arguments are not known here
        return "the torchrun command with --resume"
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    options = [] if arguments.num_gpus == 1 else ["--num-gpus", str(arguments.num_gpus)]
    if arguments.scale_batch is not None:
        options += ["--scale-batch", str(arguments.scale_batch)]
    files = ["--config-file", *arguments.config_file]
    return shlex.join([*program, *files, *arguments.overrides, "--resume", *options])


def main() -> int:
    """Start the processes."""
    arguments = parse_arguments()
    arguments.resume_command = resume_command(arguments)
    log_to_stderr(logging.ERROR)  # what is left out is said by `work`
    cfg, _ = read_configuration(arguments)  # mistakes show before anything
    # All processes evaluate one and the same model.
    members = 1 if arguments.eval_only else members_at_once(cfg)
    return (
        launch(work, arguments.num_gpus, (arguments,), device=cfg.MODEL.DEVICE, members=members)
        or 0
    )


if __name__ == "__main__":
    run_main(main)
