#!/usr/bin/env python
"""Keep what a frozen network says of a data set's images, so that heads on it train in seconds.

Each image is seen in its plain view, mirrored, and in a bank of strong views (RandAugment and
Cutout of the stored image, then resized). DATASETS.TRAIN "['features:FILE']" with CLS.MODEL.NAME
feature_head trains on them; with --stages K, the maps of the first K stages, feature_tail trains
the others. Pixels are what the package's network was trained on.

Examples:
  %(prog)s cifar10_lt100_train --output features/cifar10_lt100_train.pt
  %(prog)s cifar10_lt100_test --test --output features/cifar10_lt100_test.pt
  %(prog)s cifar10_lt100_train --stages 5 --size 96 --strong 0 --output maps/cifar10_lt100_train.pt
  %(prog)s folder:birds/train --weights package:efficientnet_lite1 --output birds.pt
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect

# isort: split
import torch

from ssod_imwa.classification.data.catalog import load_images
from ssod_imwa.classification.data.feature_sets import write_features
from ssod_imwa.classification.extraction import (
    FeatureOptions,
    made_by,
    package_network,
    view_features,
)
from ssod_imwa.cli import require_new, run_main
from ssod_imwa.errors import UserError, as_config_error


def parse_arguments() -> argparse.Namespace:
    defaults = FeatureOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a data set of classification")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="new file to write"
    )
    parser.add_argument("--root", help="folder of all data sets ($DETECTRON2_DATASETS, datasets)")
    parser.add_argument(
        "--weights",
        default="package:efficientnet_lite0",
        metavar="NAME",
        help="of the network (package:efficientnet_lite0)",
    )
    parser.add_argument(
        "--stages",
        type=int,
        default=defaults.stages,
        metavar="K",
        help="keep the maps of the first K stages (0: features)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=defaults.size,
        metavar="N",
        help=f"pixels of an edge that are seen ({defaults.size})",
    )
    parser.add_argument(
        "--strong",
        type=int,
        default=defaults.strong,
        metavar="N",
        help=f"strong views of each image ({defaults.strong})",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the strong views (0)")
    parser.add_argument(
        "--no-mirror", action="store_true", help="never mirror, for digits and the like"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="compute in bfloat16, twice as fast where there is hardware for it",
    )
    parser.add_argument("--test", action="store_true", help="the plain view alone")
    return parser.parse_args()


def _options(arguments: argparse.Namespace) -> FeatureOptions:
    try:
        return FeatureOptions(
            stages=arguments.stages,
            size=arguments.size,
            mirror=not (arguments.no_mirror or arguments.test),
            strong=0 if arguments.test else arguments.strong,
            seed=arguments.seed,
            precision="bfloat16" if arguments.bfloat16 else "float32",
        )
    except ValueError as error:
        raise UserError(f"--{error}") from error


def main() -> None:
    """Extract one view after the other."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    options = _options(arguments)
    require_new(arguments.output)
    dataset = load_images(arguments.name, root=arguments.root, in_memory=True)
    with as_config_error("--stages"):
        network = package_network(arguments.weights, options)
    views = []
    for features in view_features(network, dataset, options):
        views.append(features)
        logging.info("view %d of %d", len(views), options.views)
    made = made_by(arguments.weights, dataset, options)
    features = torch.stack(views, 1)
    write_features(arguments.output, features, dataset, weak=options.weak, made=made)
    print(f"{arguments.output}: {len(dataset)} images, {options.views} views of {made['source']}")


if __name__ == "__main__":
    run_main(main)
