#!/usr/bin/env python
"""Draw what a trained detector finds beside the ground truth, or what a method trains on.

Examples:
  detections of a run           %(prog)s output/digits_unbiased_teacher_imwa
  on another data set           %(prog)s RUN_DIR --dataset voc_2007_test --images 20
  of any weights                %(prog)s --config-file FILE --weights model.pth --output pictures
  weak and strong views with labels and the teacher's pseudo-labels
                                %(prog)s RUN_DIR --views

Writes predictions.png, or labelled_views.png and pseudo_labels.png, to RUN_DIR/pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.cli import run_main
from ssod_imwa.config import load_config
from ssod_imwa.data.catalog import load_dataset
from ssod_imwa.data.loader import build_test_batches
from ssod_imwa.data.structures import DetectionDataset, Sample
from ssod_imwa.data.views import make_sample, read_record
from ssod_imwa.detection import build
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.evaluation import predict
from ssod_imwa.detection.pseudo_labels import filter_detections
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import ConfigError
from ssod_imwa.run import CONFIG_FILE, newest_model, pick_device
from ssod_imwa.visualization.pictures import save_png
from ssod_imwa.visualization.sheets import evenly_spaced, prediction_sheet, view_sheet


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--config-file", metavar="FILE", help=f"YAML file (default: RUN_DIR/{CONFIG_FILE})"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="as MODEL.WEIGHTS (default: RUN_DIR's newest model)"
    )
    parser.add_argument(
        "--views", action="store_true", help="show training views instead of detections"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="labelled data set (default: the first of DATASETS.TEST)"
    )
    parser.add_argument("--images", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="draw detections with a score above it (0.5)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder (default: RUN_DIR/pictures)")
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="settings that override the file"
    )
    arguments = parser.parse_args()
    if arguments.run_dir is None and None in (
        arguments.config_file,
        arguments.weights,
        arguments.output,
    ):
        parser.error("give RUN_DIR, or all of --config-file, --weights and --output")
    if arguments.images < 1:
        parser.error(f"--images = {arguments.images} is not allowed (must be at least 1)")
    return arguments


def read_config(arguments: argparse.Namespace) -> CfgNode:
    """The run's configuration, with MODEL.WEIGHTS set to the weights to show."""
    overrides = list(arguments.opts)
    if arguments.run_dir is not None:
        overrides += ["OUTPUT_DIR", arguments.run_dir]  # the folder may have been moved
    cfg = load_config(
        arguments.config_file or Path(arguments.run_dir) / CONFIG_FILE, overrides
    ).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = arguments.weights or str(newest_model(cfg))
    return cfg


def show_predictions(cfg: CfgNode, arguments: argparse.Namespace, output: Path) -> list[Path]:
    """Ground truth beside detections."""
    if not (arguments.dataset or cfg.DATASETS.TEST):
        raise ConfigError("DATASETS.TEST = [] is not allowed here (name a data set by --dataset)")
    dataset = load_dataset(
        arguments.dataset or cfg.DATASETS.TEST[0],
        root=cfg.DATASETS.ROOT,
        on_bad_record=cfg.DATASETS.ON_BAD_RECORD,
    )
    chosen = dataset.subset(evenly_spaced(arguments.images, len(dataset)))
    detector = build_detector(cfg, dataset)
    batches = build_test_batches(
        chosen,
        view=build.build_test_view(cfg),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=0,
    )
    found = predict(detector, batches)
    sheet = prediction_sheet(
        [read_record(record) for record in chosen.records],
        [record.annotations for record in chosen.records],
        [found[record.image_id] for record in chosen.records],
        [str(record.image_id) for record in chosen.records],
        class_names=dataset.classes,
        threshold=arguments.threshold,
    )
    save_png(output / "predictions.png", sheet)
    return [output / "predictions.png"]


def show_views(cfg: CfgNode, arguments: argparse.Namespace, output: Path) -> list[Path]:
    """Labelled images with labels and, for a method with a teacher, unlabelled ones with its."""
    data = build.build_data(cfg)
    classes = data.labelled.classes
    samples = make_samples(cfg, data.labelled, arguments.images)
    names = [str(sample.record.image_id) for sample in samples]
    sheet = view_sheet(samples, [None] * len(samples), names, class_names=classes)
    written = [output / "labelled_views.png"]
    save_png(written[0], sheet)
    if data.unlabelled is not None:
        samples = make_samples(cfg, data.unlabelled, arguments.images)
        names = [str(sample.record.image_id) for sample in samples]
        teacher = build_detector(cfg, data.labelled)
        device = next(teacher.parameters()).device
        found = teacher.detect([sample.weak.image.to(device) for sample in samples])
        kept = [filter_detections(x, cfg.SSOD.BBOX_THRESHOLD) for x in found]
        written.append(output / "pseudo_labels.png")
        save_png(written[1], view_sheet(samples, kept, names, class_names=classes))
    return written


def make_samples(cfg: CfgNode, dataset: DetectionDataset, count: int) -> list[Sample]:
    """Views of images from all over the data set."""
    weak, strong = build.build_views(cfg)
    return [
        make_sample(dataset.records[i], weak, strong, counted_generator(cfg.SEED, "picture", i))
        for i in evenly_spaced(count, len(dataset))
    ]


def build_detector(cfg: CfgNode, dataset: DetectionDataset) -> Detector:
    """The detector with its trained weights, on its device."""
    detector = build.build_detector(cfg, len(dataset.classes))
    return detector.to(pick_device(cfg.MODEL.DEVICE))


@torch.no_grad()
def main() -> None:
    """Draw and name the files."""
    arguments = parse_arguments()
    cfg = read_config(arguments)
    output = Path(arguments.output or Path(arguments.run_dir) / "pictures")
    show = show_views if arguments.views else show_predictions
    for path in show(cfg, arguments, output):
        print(path)


if __name__ == "__main__":
    run_main(main)
