#!/usr/bin/env python
"""Find everything wrong in data sets before training on them, and count their classes.

Exit status: 0 when clean, 1 when there are problems, 2 when a data set cannot be read at all.
"error" stops a run unless DATASETS.ON_BAD_RECORD is skip; "warning" is logged by a run; what needs
no action, such as grayscale images, is counted as a note.

Examples:
  %(prog)s digits_train digits_test
  %(prog)s voc:my_cells:train coco:pallets/train.json:pallets/images --root /data
  %(prog)s folder:photos --unlabeled --fast
  %(prog)s cifar10_lt100_train folder:birds/train --classification
  %(prog)s my_cells_train --import my_project.data
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from itertools import groupby

import numpy as np

from ssod_imwa.classification.data.catalog import available_images, load_images
from ssod_imwa.classification.data.validation import find_image_problems
from ssod_imwa.cli import add_import_option, run_main
from ssod_imwa.data.problems import Problem
from ssod_imwa.data.registration import import_modules
from ssod_imwa.detection.data.catalog import available, read_dataset
from ssod_imwa.detection.data.records import DetectionDataset
from ssod_imwa.detection.data.validation import find_problems


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Names for detection: {', '.join(available())}; with --classification: "
        f"{', '.join(available_images())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="of the catalog, or coco:FILE.json:IMAGES, voc:FOLDER:SPLIT, folder:FOLDER; with "
        "--classification folder:FOLDER (a folder a class) or list:FILE.txt:IMAGES",
    )
    parser.add_argument(
        "--classification", action="store_true", help="one label an image instead of boxes"
    )
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument("--unlabeled", action="store_true", help="check the images alone")
    parser.add_argument("--fast", action="store_true", help="do not open the image files")
    add_import_option(parser)
    return parser.parse_args()


def main() -> int:
    """Check each data set."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    import_modules(arguments.modules, option="--import")
    check = check_images if arguments.classification else check_detection
    return min(sum(check(name, arguments) for name in arguments.names), 1)


def check_detection(name: str, arguments: argparse.Namespace) -> bool:
    """Print what is wrong in a detection set; whether anything is."""
    dataset, problems = read_dataset(name, root=arguments.root, labeled=not arguments.unlabeled)
    problems += find_problems(dataset, read_pixels=not arguments.fast)
    serious = [problem for problem in problems if problem.level != "note"]
    print_problems(serious)
    for what, count in sorted(Counter(p.what for p in problems if p.level == "note").items()):
        rule = next(p.rule for p in problems if p.what == what)
        print(f"note: {count} x {what} ({rule})")
    print_summary(name, len(dataset), serious)
    print_classes(dataset)
    return bool(serious)


def check_images(name: str, arguments: argparse.Namespace) -> bool:
    """Print what is wrong in a classification set; whether anything is."""
    dataset = load_images(name, root=arguments.root)
    problems = find_image_problems(dataset, read_pixels=not arguments.fast)
    print_problems(problems)
    print_summary(name, len(dataset), problems)
    width = max(map(len, dataset.classes))
    print(f"  {'class':{width}} {'images':>7}")
    for class_name, count in zip(dataset.classes, dataset.counts, strict=True):
        print(f"  {class_name:{width}} {count:>7}")
    print_imbalance(dataset.counts, "images")
    return bool(problems)


def print_summary(name: str, images: int, problems: list[Problem]) -> None:
    """One line on the whole set."""
    plural = "" if len(problems) == 1 else "s"
    print(f"{name}: {images} images, {len(problems)} problem{plural}")


def print_imbalance(counts: list[int], what: str) -> None:
    """The ratio of the largest class to the smallest."""
    if min(counts) > 0:
        ratio = max(counts) / min(counts)
        print(f"  imbalance {ratio:.1f} (most over fewest {what} of a class)")


def print_problems(problems: list[Problem]) -> None:
    """Every problem under the file it is in."""
    problems = sorted(problems, key=lambda problem: problem.file)
    for file, group in groupby(problems, key=lambda problem: problem.file):
        print(file)
        for problem in group:
            print(f"  {problem.level}: {problem}")


def print_classes(dataset: DetectionDataset) -> None:
    """Images and boxes of each class, and how imbalanced they are."""
    labeled = [r.annotations for r in dataset.records if r.annotations is not None]
    if not labeled:
        print("  no labels")
        return
    width = max(map(len, dataset.classes))
    print(f"  {'class':{width}} {'images':>7} {'boxes':>7} {'difficult':>9} {'crowds':>7}")
    boxes = []
    for label, name in enumerate(dataset.classes):
        of_class = [a.labels == label for a in labeled]
        pairs = list(zip(of_class, labeled, strict=True))
        images = sum(bool((chosen & ~a.crowd).any()) for chosen, a in pairs)
        crowds = sum(int((chosen & a.crowd).sum()) for chosen, a in pairs)
        difficult = sum(int((chosen & a.difficult).sum()) for chosen, a in pairs)
        boxes.append(int(np.sum([chosen.sum() for chosen in of_class])) - crowds)
        print(f"  {name:{width}} {images:>7} {boxes[-1]:>7} {difficult:>9} {crowds:>7}")
    print_imbalance(boxes, "boxes")


if __name__ == "__main__":
    run_main(main)
