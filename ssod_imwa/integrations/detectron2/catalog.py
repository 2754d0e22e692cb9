"""Data sets between detectron2's catalogs and ours, and its evaluators on our detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from ssod_imwa.data.image_files import image_size
from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, Detections, ImageRecord
from ssod_imwa.errors import DataError


def from_detectron2(name: str, *, labeled: bool = True) -> DetectionDataset:
    """A data set that is registered in DatasetCatalog, with the classes of its metadata.

    Args:
        name: in DatasetCatalog.
        labeled: whether to read labels; without them `annotations` may be absent.

    Raises:
        DataError: an entry lacks what we need.
    """
    classes = tuple(MetadataCatalog.get(name).get("thing_classes", ())) if labeled else ()
    if labeled and not classes:
        raise DataError(
            f"data set {name!r} of detectron2's catalog has no class names (set "
            f"MetadataCatalog.get({name!r}).thing_classes)"
        )
    entries = DatasetCatalog.get(name)
    records = tuple(
        _record(name, number, entry, len(classes), labeled=labeled)
        for number, entry in enumerate(entries)
    )
    return DetectionDataset(name, records, classes)


def _record(
    name: str, number: int, entry: dict[str, Any], classes: int, *, labeled: bool
) -> ImageRecord:
    if "file_name" not in entry:
        raise DataError(f"{_entry(name, number)} has no file_name")
    if "height" in entry and "width" in entry:
        width, height = entry["width"], entry["height"]
    else:
        width, height = image_size(entry["file_name"])
    annotations = None
    if labeled:
        annotations = _annotations(_entry(name, number), entry.get("annotations"), classes)
    image_id = entry.get("image_id", entry["file_name"])
    return ImageRecord(str(entry["file_name"]), image_id, width, height, annotations)


def _entry(name: str, number: int) -> str:
    return f"entry {number} of detectron2's data set {name!r}"


def _annotations(where: str, objects: list[dict[str, Any]] | None, classes: int) -> Annotations:
    if objects is None:
        raise DataError(
            f"{where} has no annotations (an image without objects has an empty list; images "
            "without labels belong to DATASETS.TRAIN_UNLABELED)"
        )
    boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
    labels = [o["category_id"] for o in objects]
    if not all(0 <= label < classes for label in labels):
        raise DataError(
            f"{where} has category_id {max(labels, key=abs)} (must be 0..{classes - 1}, as in "
            "thing_classes)"
        )
    return Annotations(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array([bool(o.get("iscrowd", 0)) for o in objects], dtype=bool),
        difficult=np.zeros(len(objects), dtype=bool),
    )


def register_in_detectron2(names: Sequence[str], *, root: str | Path | None = None) -> None:
    """Register data sets of our catalog in DatasetCatalog and MetadataCatalog.

    Args:
        names: as `load_dataset` takes them; detectron2 must not have them yet.
        root: folder of all data sets.

    Raises:
        DataError: a name is not known or its files are missing, or detectron2 has it already.

    Example::

        register_in_detectron2(["digits_train", "digits_test"])
        cfg.DATASETS.TRAIN = ("digits_train",)
    """
    taken = sorted(set(names) & set(DatasetCatalog.list()))
    if taken:
        raise DataError(f"detectron2 has data sets of the names {', '.join(taken)} already")
    for name in names:
        dataset = load_dataset(name, root=root)
        DatasetCatalog.register(name, lambda dataset=dataset: detectron2_dicts(dataset))
        MetadataCatalog.get(name).set(thing_classes=list(dataset.classes), evaluator_type="coco")


def detectron2_dicts(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """The images of a data set in detectron2's standard format."""
    return [
        {
            "file_name": record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "annotations": [] if record.annotations is None else _objects(record.annotations),
        }
        for record in dataset.records
    ]


def _objects(annotations: Annotations) -> list[dict[str, Any]]:
    columns = (annotations.boxes.tolist(), annotations.labels.tolist(), annotations.crowd.tolist())
    return [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": label,
            "iscrowd": int(crowd),
        }
        for box, label, crowd in zip(*columns, strict=True)
    ]


def run_evaluator(
    evaluator: DatasetEvaluator,
    dataset: DetectionDataset,
    predictions: Mapping[int | str, Detections],
) -> Any:
    """What a detectron2 evaluator says about our detections.

    Args:
        evaluator: such as `COCOEvaluator`; its data set has to be registered in detectron2.
        dataset: the images.
        predictions: detections of every image by its id, as `detection.evaluation.predict` returns.

    Example::

        register_in_detectron2(["digits_test"])
        evaluator = COCOEvaluator("digits_test", tasks=("bbox",), output_dir=folder)
        results = run_evaluator(evaluator, load_dataset("digits_test"), predict(detector, batches))
    """
    evaluator.reset()
    for record in dataset.records:
        found = predictions[record.image_id]
        instances = Instances((record.height, record.width))
        instances.pred_boxes = Boxes(found.boxes.cpu())
        instances.pred_classes = found.labels.cpu()
        instances.scores = found.scores.cpu()
        entry = {"file_name": record.file_name, "image_id": record.image_id}
        evaluator.process([entry], [{"instances": instances}])
    return evaluator.evaluate()
