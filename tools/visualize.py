#!/usr/bin/env python
"""Draw what a trained detector finds beside the ground truth, or what a method trains on.

Examples:
  detections of a run           %(prog)s output/digits_unbiased_teacher_imwa
  on another data set           %(prog)s RUN_DIR --dataset voc_2007_test --images 20
  of any weights                %(prog)s --config-file FILE --weights model.pth --output pictures
  weak and strong views with labels and the teacher's pseudo-labels
                                %(prog)s RUN_DIR --views
  the views that a detector or classifier is trained on, before it is trained
                                %(prog)s --config-file FILE --views --output pictures

Writes predictions.png, or labeled_views.png and pseudo_labels.png (of a classifier
unlabeled_views.png), to RUN_DIR/pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect

# isort: split
# Before what warns of its own libraries when it is imported.
from ssod_imwa.cli import (
    add_import_option,
    refuse_settings,
    require_folder,
    run_main,
    split_config_file,
)

# isort: split
import torch
from fvcore.common.config import CfgNode

from ssod_imwa.analysis.class_views import class_view_sheets
from ssod_imwa.analysis.detection import prediction_sheets, view_sheets
from ssod_imwa.data.registration import import_modules
from ssod_imwa.engine.checkpoint.models import newest_model
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import CONFIG_FILE
from ssod_imwa.visualization.pictures import save_png


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--config-file",
        nargs="+",
        metavar="FILE",
        help=f"YAML files, merged left to right; KEY VALUE may follow (default: RUN_DIR/"
        f"{CONFIG_FILE})",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="as MODEL.WEIGHTS (default: RUN_DIR's newest model)"
    )
    parser.add_argument(
        "--views", action="store_true", help="show training views instead of detections"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="",
        help="labeled data set (default: the first of DATASETS.TEST)",
    )
    parser.add_argument("--images", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="draw detections with a score above it (0.5)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder (default: RUN_DIR/pictures)")
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="settings that override the files'; they stand after RUN_DIR",
    )
    add_import_option(parser)
    arguments, rest = parser.parse_known_args()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (settings follow --opts)")
    check_arguments(parser, arguments)
    if arguments.config_file is not None:
        arguments.config_file, arguments.opts = split_config_file(
            arguments.config_file, arguments.opts, option="--opts"
        )
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what argparse does not."""
    if len(arguments.opts) % 2:
        parser.error(
            f"--opts takes pairs KEY VALUE, but {arguments.opts[-1]!r} stands alone (RUN_DIR comes "
            "before --opts)"
        )
    needed = [arguments.config_file, arguments.output]
    if not arguments.views:
        needed.append(arguments.weights)
    if arguments.run_dir is None and None in needed:
        parser.error(
            "give RUN_DIR, or --config-file, --output and --weights (--views shows labels without "
            "weights)"
        )
    if arguments.views and arguments.dataset:
        parser.error("--dataset is not read with --views (give --opts DATASETS.TRAIN)")
    if arguments.images < 1:
        parser.error(f"--images = {arguments.images} is not allowed (must be at least 1)")
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold = {arguments.threshold:g} is not allowed (must be 0..1)")


def make_sheets(cfg: CfgNode, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The pictures that are asked for, by the names of their files."""
    if cfg.TASK == "classification" and arguments.views:
        return class_view_sheets(cfg, images=arguments.images)
    if cfg.TASK != "detection":
        source = arguments.run_dir or " ".join(arguments.config_file)
        raise ConfigError(
            f"{source} is of {cfg.TASK} (must be of detection, or --views; tools/analyze.py draws "
            "classifiers)"
        )
    refuse_settings(arguments.opts, {"MODEL.WEIGHTS": "--weights"})
    weights = arguments.weights
    if weights is None and arguments.run_dir is not None:
        weights = newest_model(cfg.OUTPUT_DIR)
    if arguments.views:
        return view_sheets(cfg, weights, images=arguments.images)
    return prediction_sheets(
        cfg,
        weights,
        dataset=arguments.dataset,
        images=arguments.images,
        threshold=arguments.threshold,
    )


def main() -> None:
    """Draw and name the files."""
    arguments = parse_arguments()
    output = Path(arguments.output or Path(arguments.run_dir) / "pictures")
    require_folder(output)
    import_modules(arguments.modules, option="--import")
    overrides = list(arguments.opts)
    if arguments.run_dir is not None:
        refuse_settings(overrides, {"OUTPUT_DIR": "the folder of another run, or --output"})
        overrides += ["OUTPUT_DIR", arguments.run_dir]  # the folder may have been moved
    cfg = load_config(arguments.config_file or Path(arguments.run_dir) / CONFIG_FILE, overrides)
    sheets = make_sheets(cfg, arguments)
    for name, sheet in sheets.items():
        save_png(output / name, sheet)
        print(output / name)


if __name__ == "__main__":
    run_main(main)
