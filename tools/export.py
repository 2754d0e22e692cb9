#!/usr/bin/env python
"""Export a trained detector or classifier to files that its library loads without this package.

Examples:
  a finished run    %(prog)s output/digits_unbiased_teacher_imwa --output detector.pth
  one of its files  %(prog)s RUN_DIR/model_averaged.pth --output detector.pth

Takes the averaged EMA model (the student if the method has no EMA or burn-in is not over), and
prints the SHA-256 of the written file and the Python lines that load it. The file holds the weights
("model"), the names of the classes ("classes") and the size of images ("input"). For detectron2 its
configuration is written beside it (FILE with .yaml). Of a classifier what only training needs is
left out; networks that neither torchvision nor timm has are loaded by this package's classes.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import require_new, run_main
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.runs.export import export_model
from ssod_imwa.runs.trained import read_trained


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_DIR|CHECKPOINT",
        help=f"OUTPUT_DIR of a finished run, or its {FINAL} or model_averaged.pth",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="file to write, such as x.pth"
    )
    parser.add_argument(
        "--import",
        dest="asked",
        nargs=1,
        default=[],
        metavar="FILE",
        help="the LazyConfig (.py) that the run names, if it is one of your own: it is run",
    )
    return parser.parse_args()


def main() -> None:
    """Write the file and say how to load it."""
    arguments = parse_arguments()
    require_new(arguments.output)
    trained = read_trained(arguments.source)
    code = export_model(trained, arguments.output, asked=arguments.asked)
    digest = hashlib.sha256(arguments.output.read_bytes()).hexdigest()
    print(f"{arguments.output}: the {trained.inference_model} of {trained.path}")
    print(f"sha256 {digest}\n")
    print(code, end="")


if __name__ == "__main__":
    run_main(main)
