#!/usr/bin/env python
"""Plot a run's training curves and its figures after each episode, or how often classes occur.

Examples:
  a run                    %(prog)s output/digits_unbiased_teacher_imwa
  other figures            %(prog)s RUN_DIR --metrics VOC/AP50 APs
  classes of data sets     %(prog)s --datasets digits_train digits_test --output pictures

Writes training.png and, once there is something to show, episodes.png, course.png (evaluations
inside episodes), labels.png (pseudo-labels) and advice.png (IMWA.ADVISE), and classes.png for
--datasets, to RUN_DIR or --output. Also works while the run goes on.
"""

from __future__ import annotations

import argparse
import logging

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.analysis.datasets import boxes_figure
from ssod_imwa.cli import add_import_option, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.visualization.plots import run_figures, save_figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="figures to plot (default: AP and AP50; of classifiers top1, many, h_mean and so on)",
    )
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="plot boxes per class of these data sets"
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="as DATASETS.ROOT (default: $DETECTRON2_DATASETS)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder (default: RUN_DIR)")
    add_import_option(parser)
    arguments = parser.parse_args()
    if arguments.run_dir is None and arguments.datasets is None:
        parser.error("give RUN_DIR or --datasets")
    if arguments.run_dir is None and arguments.output is None:
        parser.error("give --output when there is no RUN_DIR")
    if arguments.run_dir is None and arguments.metrics is not None:
        parser.error("--metrics is of a RUN_DIR, and none is given")
    if arguments.datasets is None and arguments.data_root is not None:
        parser.error("--data-root is of --datasets, and none is given")
    return arguments


def main() -> None:
    """Write the figures and name the files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows skipped records
    arguments = parse_arguments()
    import_modules(arguments.modules, option="--import")
    figures = {}
    if arguments.run_dir is not None:
        figures |= run_figures(arguments.run_dir, metrics=arguments.metrics)
        if "episodes.png" not in figures:
            print("no episodes.png: no episode has been evaluated yet")
    if arguments.datasets is not None:
        figures["classes.png"] = boxes_figure(arguments.datasets, root=arguments.data_root)
    for path in save_figures(figures, arguments.output or arguments.run_dir):
        print(path)


if __name__ == "__main__":
    run_main(main)
