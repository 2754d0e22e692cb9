"""From a configuration to sheets of what its detector finds and trains on."""

from __future__ import annotations

from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from ssod_imwa.analysis.sheets import evenly_spaced, prediction_sheet, view_sheet
from ssod_imwa.data.loader import build_test_batches
from ssod_imwa.data.registration import import_modules
from ssod_imwa.detection import build
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.images import DetectionImages
from ssod_imwa.detection.data.records import DetectionDataset, Detections, View
from ssod_imwa.detection.data.views import make_record_views, read_record
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.evaluation import predict
from ssod_imwa.detection.methods.dense_teacher import LIKELY, label_densely, region_detections
from ssod_imwa.detection.pseudo_labels import filter_detections
from ssod_imwa.engine.device import pick_device
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import ConfigError


def prediction_sheets(
    cfg: CfgNode, weights: str | Path, *, dataset: str = "", images: int, threshold: float
) -> dict[str, torch.Tensor]:
    """Ground truth beside detections, for images from all over a data set.

    Args:
        cfg: of the run.
        weights: of the detector, as MODEL.WEIGHTS takes them.
        dataset: name of a labeled set with the detector's classes; "" takes the first of
            DATASETS.TEST.
        images: at most so many.
        threshold: detections above this score are drawn.

    Returns:
        uint8 (3, H, W), by the name of its file.
    """
    if not (dataset or cfg.DATASETS.TEST):
        raise ConfigError("DATASETS.TEST = [] is not allowed (name a labeled data set)")
    import_modules(cfg.DATASETS.IMPORT)
    drawn = load_dataset(
        dataset or cfg.DATASETS.TEST[0],
        root=cfg.DATASETS.ROOT,
        on_bad_record=cfg.DATASETS.ON_BAD_RECORD,
    )
    drawn = drawn.subset(evenly_spaced(images, len(drawn)))
    detections = find_on_dataset(cfg, weights, drawn)
    records = drawn.records
    sheet = prediction_sheet(
        [read_record(record) for record in records],
        [record.annotations for record in records if record.annotations is not None],
        [detections[record.image_id] for record in records],
        [str(record.image_id) for record in records],
        class_names=drawn.classes,
        threshold=threshold,
    )
    return {"predictions.png": sheet}


def find_on_dataset(
    cfg: CfgNode, weights: str | Path, dataset: DetectionDataset
) -> dict[int | str, Detections]:
    """A detector's findings by image id, boxes in pixels of the stored images, on the CPU.

    Args:
        cfg: of the run.
        weights: of the detector, as MODEL.WEIGHTS takes them.
        dataset: of its classes.
    """
    detector = _build_detector(cfg, weights, len(dataset.classes))
    batches = build_test_batches(
        DetectionImages.unlabeled(dataset),
        build.build_test_view(cfg),
        batch_size=cfg.TEST.IMS_PER_BATCH,
    )
    return predict(detector, dataset, batches)


def view_sheets(
    cfg: CfgNode, weights: str | Path | None, *, images: int
) -> dict[str, torch.Tensor]:
    """Weak views beside strong ones, with the boxes that training uses.

    Args:
        cfg: of the run.
        weights: of the teacher, as MODEL.WEIGHTS takes them; None leaves pseudo-labels out.
        images: at most so many on each sheet.

    Returns:
        By the names of their files, a sheet of labeled images and, if the method uses them, one of
        unlabeled images with the boxes of the teacher that become labels: those above
        SSOD.BBOX_THRESHOLD, or what a dense learning region probably means.
    """
    data = build.build_data(cfg)
    classes = data.labeled.classes
    views, names = _make_views(cfg, data.labeled, images)
    labeled = view_sheet(views, [None] * len(views), names, class_names=classes)
    if data.unlabeled is None or weights is None:
        return {"labeled_views.png": labeled}
    views, names = _make_views(cfg, data.unlabeled, images)
    teacher = _build_detector(cfg, weights, len(classes))
    device = next(teacher.parameters()).device
    pseudo_labels = [_taught(cfg, teacher, x["weak"].image.to(device)) for x in views]
    unlabeled = view_sheet(views, pseudo_labels, names, class_names=classes)
    return {"labeled_views.png": labeled, "pseudo_labels.png": unlabeled}


def _taught(cfg: CfgNode, teacher: Detector, image: torch.Tensor) -> Detections:
    if "REGION_RATIO" in cfg.SSOD:
        labels = label_densely(teacher.dense_maps([image]), cfg.SSOD.REGION_RATIO)
        return filter_detections(region_detections(labels)[0], LIKELY)
    return filter_detections(teacher.detect([image])[0], cfg.SSOD.BBOX_THRESHOLD)


def _make_views(
    cfg: CfgNode, dataset: DetectionDataset, count: int
) -> tuple[list[dict[str, View]], list[str]]:
    """Views of images from all over a data set, and the images' names."""
    positions = evenly_spaced(count, len(dataset))
    views = [
        make_record_views(
            dataset.records[i], build.build_views(cfg), counted_generator(cfg.SEED, "picture", i)
        )
        for i in positions
    ]
    return views, [str(dataset.records[i].image_id) for i in positions]


def _build_detector(cfg: CfgNode, weights: str | Path, num_classes: int) -> Detector:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)
    return build_detector(cfg, num_classes).to(pick_device(cfg.MODEL.DEVICE))
