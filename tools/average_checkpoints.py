#!/usr/bin/env python
"""Average the models of finished runs into one ("model soup").

Examples:
  equal weights           %(prog)s RUN_DIR RUN_DIR RUN_DIR --output soup.pth
  given weights           %(prog)s RUN_DIR RUN_DIR --rule fixed --weights 0.3 0.7 --output soup.pth
  only models that help   %(prog)s RUN_DIR RUN_DIR --rule greedy --dataset voc_2007_val ...
  best point between two  %(prog)s RUN_DIR RUN_DIR --rule line --dataset voc_2007_val ...

Models average well if they began with the same weights: runs with one SEED and different
IMWA.FIRST_MEMBER, or one run's checkpoints. Greedy and line measure --metric on --dataset, which
should not be the test set. No code is run because a run's file names it: --import names the modules
that register data sets, and a LazyConfig (.py) of your own. The result is a file like
model_final.pth: evaluate it with train_net.py --eval-only MODEL.WEIGHTS soup.pth, export it with
export.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import add_import_option, require_new, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.runs.soups import (
    MEASURING,
    RULES,
    build_metric,
    choose_coefficients,
    write_average,
)
from ssod_imwa.runs.trained import read_trained


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RUN_DIR|FILE", help="finished runs, or their model files"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="new file to write"
    )
    parser.add_argument("--rule", choices=RULES, default="uniform", help="see above (uniform)")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="for --rule fixed: one a model, sum 1"
    )
    parser.add_argument("--dataset", metavar="NAME", help="for greedy and line: what to measure on")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="for greedy and line (AP in detection, top1 of classifiers)",
    )
    add_import_option(parser)
    arguments = parser.parse_args()
    if (arguments.rule == "fixed") != (arguments.weights is not None):
        parser.error("--rule fixed and --weights belong together; give both or neither")
    if (arguments.rule in MEASURING) != (arguments.dataset is not None):
        parser.error("--rule greedy or line and --dataset belong together; give both or neither")
    return arguments


def main() -> None:
    """Read, average, write."""
    arguments = parse_arguments()
    modules = [name for name in arguments.modules if not name.endswith(".py")]
    import_modules(modules, option="--import")
    require_new(arguments.output)
    files = [read_trained(source) for source in arguments.sources]
    metric = None
    if arguments.rule in MEASURING:
        metric = build_metric(
            files[0], arguments.dataset, arguments.metric, asked=arguments.modules, show=print
        )
    coefficients = choose_coefficients(
        files, arguments.rule, weights=arguments.weights, metric=metric
    )
    write_average(files, coefficients, arguments.output)
    for file, coefficient in zip(files, coefficients, strict=True):
        print(f"{coefficient:.4f} {file.path}")
    print(f"{arguments.output}: {' and '.join(files[0].models)} of {len(files)} models")


if __name__ == "__main__":
    run_main(main)
