#!/usr/bin/env python
"""Make the table of Small-ImageNet-127's classes from the lists that you have.

The images are the down-sampled ImageNet in ROOT/imagenet32 or ROOT/imagenet64; the table goes to
ROOT/imagenet127/classes.txt. Lists of either kind do:

  labels of validation images, in 127 and in 1000 classes
    %(prog)s val_up_down_127.txt --fine val.txt --synsets map_clsloc.txt --root ROOT
  classes of training images, whose names begin with their synsets
    %(prog)s imgname2folder.txt --synsets map_clsloc.txt --root ROOT
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.classification.data.imagenet127 import (
    MAP_FILE,
    class_table,
    fine_to_coarse,
    read_fine_counts,
)
from ssod_imwa.cli import run_main
from ssod_imwa.data.roots import data_root
from ssod_imwa.engine.checkpoint.atomic import write_output


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "coarse", type=Path, metavar="FILE", help="lines IMAGE CLASS in the 127 classes"
    )
    parser.add_argument("--fine", type=Path, metavar="FILE", help="lines IMAGE LABEL, 0..999")
    parser.add_argument(
        "--synsets", type=Path, metavar="FILE", required=True, help="lines SYNSET NUMBER NAME"
    )
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument(
        "--size", type=int, choices=(32, 64), default=32, help="of the images that are counted (32)"
    )
    return parser.parse_args()


def main() -> None:
    """Write the table and name it."""
    arguments = parse_arguments()
    root = data_root(arguments.root)
    coarse = fine_to_coarse(arguments.coarse, arguments.fine, arguments.synsets)
    lines = class_table(coarse, read_fine_counts(root, size=arguments.size))
    file = root / MAP_FILE
    write_output(file, ("\n".join(lines) + "\n").encode())
    print(file)


if __name__ == "__main__":
    run_main(main)
