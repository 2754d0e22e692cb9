#!/usr/bin/env python
"""Find everything wrong in data sets before training on them, and count their classes.

Exit status: 0 without errors, 1 with errors, 2 when a data set cannot be read at all.
"error" stops a run unless DATASETS.ON_BAD_RECORD is skip; "warning" is logged by a run; what needs
no action, such as a grayscale image, is a note. Findings stand by kind, with the file to edit.

Examples:
  %(prog)s digits_train digits_test
  %(prog)s voc:my_cells:train coco:pallets/train.json:pallets/images --root /data
  %(prog)s folder:photos --unlabeled --fast
  %(prog)s cifar10_lt100_train folder:birds/train --classification
  %(prog)s folder:birds/unlabeled --classification --unlabeled
  %(prog)s my_cells_train --import my_project.data
"""

from __future__ import annotations

import argparse
import logging

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.classification.data.catalog import available_images
from ssod_imwa.classification.data.reports import check_images
from ssod_imwa.cli import add_import_option, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.data.reports import Report
from ssod_imwa.detection.data.catalog import available
from ssod_imwa.detection.data.reports import check_dataset


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
    parser.add_argument("--all", action="store_true", help="every finding, not 5 of a kind")
    add_import_option(parser)
    return parser.parse_args()


def check(name: str, arguments: argparse.Namespace) -> Report:
    if arguments.classification:
        return check_images(
            name,
            root=arguments.root,
            labeled=not arguments.unlabeled,
            read_pixels=not arguments.fast,
            show_all=arguments.all,
        )
    return check_dataset(
        name,
        root=arguments.root,
        labeled=not arguments.unlabeled,
        read_pixels=not arguments.fast,
        show_all=arguments.all,
    )


def main() -> int:
    """Check each data set."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    import_modules(arguments.modules, option="--import")
    all_sound = True
    for name in arguments.names:
        report = check(name, arguments)
        print("\n".join(report.lines))
        all_sound &= report.is_sound
    return 0 if all_sound else 1


if __name__ == "__main__":
    run_main(main)
