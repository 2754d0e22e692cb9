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
import itertools
import logging
from pathlib import Path

from ssod_imwa.cli import add_import_option, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.data.roots import data_root
from ssod_imwa.detection.data.catalog import fingerprint, load_dataset
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.detection.data.split_files import (
    coco_content,
    coco_split_paths,
    part_of_coco,
    unlabeled_partner,
    write_json,
)
from ssod_imwa.detection.data.splits import (
    class_counts,
    index_file_content,
    split_dataset,
    verify_coco_files,
    verify_index_file,
    with_integer_ids,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="name of the catalog, or coco:... or voc:...")
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument("--percent", type=float, nargs="+", help="labeled images in percent")
    parser.add_argument(
        "--folds", type=int, nargs="+", default=[1], help="each is the seed of a draw (1)"
    )
    parser.add_argument("--format", choices=("index", "coco"), default="index", help="(index)")
    parser.add_argument("--output", type=Path, help="file to write (index) or folder (coco)")
    parser.add_argument(
        "--keep-empty", action="store_true", help="draw among images without boxes, too"
    )
    parser.add_argument(
        "--on-bad-record", choices=("error", "skip"), default="error", help="(error)"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="verify this index file or labeled COCO file"
    )
    add_import_option(parser)
    arguments = parser.parse_args()
    if arguments.check is None and not (arguments.percent and arguments.output):
        parser.error("--percent and --output are needed (or --check)")
    return arguments


def main() -> int:
    """Write or check, and show what each split holds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    import_modules(arguments.modules, option="--import")
    dataset = load_dataset(
        arguments.dataset, root=arguments.root, on_bad_record=arguments.on_bad_record
    )
    print_header()
    if arguments.check is not None:
        check(dataset, arguments.check)
        print(f"{arguments.check} fits {dataset.name}")
    elif arguments.format == "index":
        write_index(dataset, arguments)
    else:
        write_coco(dataset, arguments)
    return 0


def check(dataset: DetectionDataset, path: Path) -> None:
    """Verify an index file, or the labeled one of two COCO files."""
    if unlabeled_partner(path).exists():
        fold, _, percent = path.stem.rpartition(".")[2].partition("@")
        print_split(percent, fold, verify_coco_files(dataset, path)[0])
        return
    for percent, fold, labeled in verify_index_file(dataset, path):
        print_split(f"{percent:g}", str(fold), labeled)


def write_index(dataset: DetectionDataset, arguments: argparse.Namespace) -> None:
    """Write one index file."""
    content = index_file_content(
        dataset,
        percents=arguments.percent,
        folds=arguments.folds,
        filter_empty=not arguments.keep_empty,
    )
    write_json(arguments.output, content)
    check(dataset, arguments.output)
    print(f"written; use it with DATASETS.SPLIT.FILE {arguments.output.resolve()}")


def write_coco(dataset: DetectionDataset, arguments: argparse.Namespace) -> None:
    """Write two COCO files for each percentage and fold."""
    numbered = with_integer_ids(dataset)
    content, stem, images = coco_content(numbered, root=data_root(arguments.root))
    for percent, fold in itertools.product(arguments.percent, arguments.folds):
        parts = split_dataset(
            numbered, percent=percent, fold=fold, filter_empty=not arguments.keep_empty
        )
        paths = coco_split_paths(arguments.output, stem, percent=percent, fold=fold)
        for path, part in zip(paths, parts, strict=True):
            write_json(path, part_of_coco(content, part))
        check(dataset, paths[0])
        labeled, unlabeled = (f"coco:{path.resolve()}:{images}" for path in paths)
        print(f"written; use DATASETS.TRAIN {labeled} DATASETS.TRAIN_UNLABELED {unlabeled}")


def print_header() -> None:
    """Column titles of `print_split`."""
    print(f"{'percent':>7} {'fold':>4} {'images':>6} {'boxes':>7}  ids (SHA-256)  class: boxes")


def print_split(percent: str, fold: str, labeled: DetectionDataset) -> None:
    """One line on what a split's labeled images hold, and a warning for missing classes."""
    counts = class_counts(labeled)
    images, digest = fingerprint(labeled).split(":")
    classes = " ".join(f"{c}:{n}" for c, n in zip(labeled.classes, counts, strict=True))
    print(f"{percent:>7} {fold:>4} {images:>6} {sum(counts):>7}  {digest[:12]}   {classes}")
    missing = [c for c, n in zip(labeled.classes, counts, strict=True) if n == 0]
    if missing:
        print(f"warning: no labeled box of {', '.join(missing)}; another fold may have some")


if __name__ == "__main__":
    run_main(main)
