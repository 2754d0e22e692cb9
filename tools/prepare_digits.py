#!/usr/bin/env python
"""Make the digit scenes, the small data set of the quick start.

Training makes them by itself when it first needs them; this command is for another seed, size or
imbalance. They are written to ROOT/digits and used as digits_train and digits_test.

Examples:
  %(prog)s
  %(prog)s --root other_datasets --seed 2 --imbalance 100
"""

from __future__ import annotations

import argparse

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import run_main
from ssod_imwa.data.roots import data_root
from ssod_imwa.detection.data.digits import IMBALANCE, TEST_SCENES, TRAIN_SCENES, make_digits


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument("--seed", type=int, default=1, help="everything is a function of it (1)")
    parser.add_argument(
        "--train-scenes",
        type=int,
        default=TRAIN_SCENES,
        metavar="N",
        help=f"images of digits_train ({TRAIN_SCENES})",
    )
    parser.add_argument(
        "--test-scenes",
        type=int,
        default=TEST_SCENES,
        metavar="N",
        help=f"images of digits_test ({TEST_SCENES})",
    )
    parser.add_argument(
        "--imbalance",
        type=int,
        default=IMBALANCE,
        metavar="N",
        help=f"boxes of the most frequent over those of the rarest training class ({IMBALANCE})",
    )
    return parser.parse_args()


def main() -> None:
    """Make the scenes."""
    arguments = parse_arguments()
    folder = data_root(arguments.root) / "digits"
    make_digits(
        folder,
        seed=arguments.seed,
        train_scenes=arguments.train_scenes,
        test_scenes=arguments.test_scenes,
        imbalance=arguments.imbalance,
    )
    scenes = f"{arguments.train_scenes} training and {arguments.test_scenes} test scenes"
    print(f"{folder}: {scenes}, seed {arguments.seed}")


if __name__ == "__main__":
    run_main(main)
