"""Data sets that a project has registered in detectron2's catalogs."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ssod_imwa.data.image_files import image_size
from ssod_imwa.data.text_files import read_flag
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError

# What detectron2's BoxMode and NumPy raise on boxes, modes and flags of other types and lengths.
_CONVERSION_ERRORS = (
    *(KeyError, TypeError, ValueError, AttributeError, AssertionError),
    NotImplementedError,
)


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
    try:
        boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in objects]
        labels = [o["category_id"] for o in objects]
        crowd = [read_flag(o.get("iscrowd", 0)) for o in objects]
        corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    except _CONVERSION_ERRORS as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{where} has an annotation that cannot be read: {reason} (must have bbox, bbox_mode, "
            "category_id and, if it has one, iscrowd of 0 or 1)"
        ) from error
    for label in labels:
        if not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
            raise DataError(
                f"{where} has category_id {label!r} (must be 0..{classes - 1}, as in thing_classes)"
            )
    return Annotations(
        boxes=corners,
        labels=np.array(labels, dtype=np.int64),
        crowd=np.array(crowd, dtype=bool),
        difficult=np.zeros(len(objects), dtype=bool),
    )
