#!/usr/bin/env python
"""Run a trained model on images: detections or classes as files.

Examples:
  a folder of photographs     %(prog)s output/bccd_supervised photos --output predictions
  files, every weak box too   %(prog)s RUN_DIR a.jpg b.png --threshold 0.05 --output predictions
  frames of a video           %(prog)s RUN_DIR frames --batch-size 16 --device cuda --output out

Of a detector it writes detections.csv (file, class, score, corners in pixels), annotations.json (a
COCO data set with scores, ready to be corrected in a labeling tool or read as
coco:annotations.json:FOLDER) and pictures; of a classifier classes.csv. Images that cannot be read
are left out and named. It takes the averaged EMA model (the student if the method has no EMA).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.analysis.predicting import (
    CLASSIFICATION_BATCH,
    DETECTION_BATCH,
    DetectionPredictor,
    Predictor,
    find_images,
    open_predictor,
    predict_images,
)
from ssod_imwa.analysis.prediction_files import common_folder, write_classes, write_detections
from ssod_imwa.cli import log_to_stderr, new_folder, require_new, run_main
from ssod_imwa.errors import DataError, UserError
from ssod_imwa.runs.trained import read_shipped

BATCHES = f"images at a time ({DETECTION_BATCH} of a detector, {CLASSIFICATION_BATCH} otherwise)"

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="RUN_DIR|FILE",
        help="a finished run, its model file, or what tools/export.py wrote",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE|FOLDER", help="files, or folders with all below them"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder for what is written"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="keep boxes with a score above it (0.5)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help=BATCHES)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--no-pictures", action="store_true", help="write no picture of boxes")
    parser.add_argument(
        "--import",
        dest="asked",
        nargs=1,
        default=[],
        metavar="FILE",
        help="the LazyConfig (.py) that the run names, if it is one of your own: it is run",
    )
    arguments = parser.parse_args()
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"--batch-size = {arguments.batch_size} is not allowed (must be at least 1)")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold = {arguments.threshold:g} is not allowed (must be 0..1)")
    return arguments


def main() -> None:
    """Predict, write and say what was written."""
    arguments = parse_arguments()
    log_to_stderr()
    require_new(arguments.output)
    trained = read_shipped(arguments.model)
    trained.require_asked(arguments.asked, reads_data=False)
    paths = find_images(arguments.images)
    threshold = 0.5 if arguments.threshold is None else arguments.threshold
    predictor = open_predictor(trained, device=arguments.device, threshold=threshold)
    of_boxes = arguments.threshold is not None or arguments.no_pictures
    if of_boxes and not isinstance(predictor, DetectionPredictor):
        raise UserError(
            f"{trained.path} is a classifier: --threshold and --no-pictures are of boxes"
        )
    with new_folder(arguments.output):
        said = write(predictor, paths, arguments)
    print(f"{arguments.output}: {said} by the {trained.inference_model} of {trained.path}")


def write(predictor: Predictor, paths: Sequence[Path], arguments: argparse.Namespace) -> str:
    """Predict and write; how much, in words."""
    unreadable: list[str] = []
    predictions = predict_images(
        predictor,
        paths,
        batch_size=arguments.batch_size or predictor.batch_size,
        unreadable=unreadable,
    )
    root, classes, output = common_folder(paths), predictor.classes, arguments.output
    if isinstance(predictor, DetectionPredictor):
        images, boxes = write_detections(
            predictions, output, root=root, classes=classes, pictures=not arguments.no_pictures
        )
        said = f"{images} images, {boxes} boxes with a score above {predictor.threshold:g}"
    else:
        images = write_classes(predictions, output, root=root, classes=classes)
        said = f"{images} images"
    if not images:
        raise DataError(f"none of {len(paths)} images can be read: {unreadable[0]}")
    for line in unreadable:
        logger.warning("left out: %s", line)
    return said


if __name__ == "__main__":
    run_main(main)
