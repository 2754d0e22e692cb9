#!/usr/bin/env python
"""Choose which images of a data set keep their labels, and write that down.

Two formats, both public conventions (docs/datasets.md):
  index  one file of list positions, like Unbiased Teacher's COCO_supervision.txt;
         used by DATASETS.SPLIT.FILE
  coco   two COCO files a fold, STEM.FOLD@PERCENT.json and STEM.FOLD@PERCENT-unlabeled.json;
         used as "coco:FILE.json:IMAGES" in DATASETS.TRAIN and DATASETS.TRAIN_UNLABELED

A split file is only needed to share a split with other code: training draws the same split from
DATASETS.SPLIT.PERCENT and FOLD alone.

Examples:
  %(prog)s digits_train --percent 5 10 --folds 1 2 3 --output splits/digits.json
  %(prog)s bccd_train --on-bad-record skip --percent 10 --format coco --output splits
  %(prog)s coco_2017_train --on-bad-record skip --check COCO_supervision.txt
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import add_import_option, require_folder, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.split_reports import (
    HEADER,
    check_split,
    write_coco_splits,
    write_index_split,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="name of the catalog, or coco:... or voc:...")
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument(
        "--percent", type=float, nargs="+", metavar="P", help="labeled images in percent"
    )
    parser.add_argument(
        "--folds",
        type=int,
        nargs="+",
        default=[1],
        metavar="K",
        help="each is the seed of a draw (1)",
    )
    parser.add_argument(
        "--format", choices=("index", "coco"), default="index", help="see above (index)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="file to write (index) or folder (coco)"
    )
    parser.add_argument(
        "--keep-empty", action="store_true", help="draw among images without boxes, too"
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("error", "skip"),
        default="error",
        help="as DATASETS.ON_BAD_RECORD (error)",
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="verify this index file or labeled COCO file"
    )
    add_import_option(parser)
    arguments = parser.parse_args()
    if arguments.check is None and not (arguments.percent and arguments.output):
        parser.error("--percent and --output are needed (or --check)")
    if arguments.check is not None and (arguments.percent or arguments.output):
        parser.error("--check draws and writes nothing (leave out --percent and --output)")
    return arguments


def main() -> None:
    """Write or check, and show what each split holds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    if arguments.check is None:
        is_folder = arguments.format == "coco"
        require_folder(arguments.output if is_folder else arguments.output.parent)
    import_modules(arguments.modules, option="--import")
    dataset = load_dataset(
        arguments.dataset, root=arguments.root, on_bad_record=arguments.on_bad_record
    )
    drawn = {
        "percents": arguments.percent,
        "folds": arguments.folds,
        "filter_empty": not arguments.keep_empty,
    }
    if arguments.check is not None:
        lines = [*check_split(dataset, arguments.check), f"{arguments.check} fits {dataset.name}"]
    elif arguments.format == "index":
        lines = write_index_split(dataset, arguments.output, **drawn)
    else:
        lines = write_coco_splits(dataset, arguments.output, root=arguments.root, **drawn)
    print("\n".join([HEADER, *lines]))


if __name__ == "__main__":
    run_main(main)
