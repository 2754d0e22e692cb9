"""COCO's annotation files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssod_imwa.data.problems import Problem, report
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError


def load_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    *,
    name: str,
    labeled: bool = True,
    problems: list[Problem] | None = None,
) -> DetectionDataset:
    """The images of a COCO file in the order of their ids.

    Category ids become 0..C-1 in the order of the ids. Segmentations are not read.

    Args:
        annotation_file: JSON with `images` and, unless `labeled` is False, `annotations` and
            `categories`. `image_info_unlabeled2017.json` has the images alone.
        image_folder: what the images' `file_name` is relative to.
        name: name of the data set.
        labeled: whether to read the annotations.
        problems: receives the annotations that cannot be represented (unknown image or category, a
            box that is not four numbers); without it the first of them raises.

    Raises:
        DataError: the file is no COCO file, or see `problems`.
    """
    content = read_coco_file(annotation_file, labeled=labeled, segmentations=False)
    records = _records(content, Path(image_folder), str(annotation_file))
    if not labeled:
        return DetectionDataset(name, tuple(records), ())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    annotations = _annotations(content, records, str(annotation_file), problems)
    return DetectionDataset(
        name,
        tuple(
            ImageRecord(r.file_name, r.image_id, r.width, r.height, a)
            for r, a in zip(records, annotations, strict=True)
        ),
        tuple(category["name"] for category in categories),
    )


def read_coco_file(
    annotation_file: str | Path, *, labeled: bool = True, segmentations: bool = True
) -> dict[str, Any]:
    """The content of a COCO file, with its outer shape checked.

    Args:
        annotation_file: JSON.
        labeled: whether `annotations` and `categories` have to be there.
        segmentations: whether to keep them; without, a file of train2017's size needs half the
            memory (2.5 instead of 4.6 GB).

    Raises:
        DataError: the file is missing, no JSON, or lacks one of the lists.
    """
    try:
        text = Path(annotation_file).read_bytes()
        content = json.loads(text, object_hook=None if segmentations else _without_segmentation)
    except FileNotFoundError:
        raise DataError(f"annotation file {annotation_file} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{annotation_file} is no JSON file: {error}") from error
    needed = ("images", "annotations", "categories") if labeled else ("images",)
    missing = [
        key
        for key in needed
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        use = "; without labels it can only be used as an unlabeled data set" if labeled else ""
        raise DataError(f"{annotation_file} has no list {' and '.join(missing)}{use}")
    for key, fields in _FIELDS.items():
        if key in needed:
            _check_fields(content[key], key, fields, annotation_file)
    return content


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _check_fields(
    entries: list[Any], key: str, fields: tuple[str, ...], annotation_file: str | Path
) -> None:
    for number, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                raise DataError(f"{annotation_file}: {key}[{number}] has no {field!r}")


def to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """A data set as the content of a COCO file, boxes as x, y, width, height.

    Category ids are label + 1. Image ids are kept if all are integers (COCO's evaluators allow no
    others), else they are position + 1. `ignore` is 1 for VOC's difficult objects.
    """
    keep_ids = all(isinstance(record.image_id, int) for record in dataset.records)
    images, annotations = [], []
    for position, record in enumerate(dataset.records):
        image_id = record.image_id if keep_ids else position + 1
        size = {"width": record.width, "height": record.height}
        images.append({"id": image_id, "file_name": record.file_name, **size})
        for entry in _coco_annotations(record.annotations):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(dataset.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _coco_annotations(annotations: Annotations | None) -> list[dict[str, Any]]:
    if annotations is None:
        return []
    boxes = annotations.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    area = boxes[:, 2:].prod(axis=1) if annotations.area is None else annotations.area
    columns = (boxes, area, annotations.labels, annotations.crowd, annotations.difficult)
    return [
        {
            "category_id": label + 1,
            "bbox": box,
            "area": pixels,
            "iscrowd": int(crowd),
            "ignore": int(difficult),
        }
        for box, pixels, label, crowd, difficult in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _records(
    content: dict[str, Any], image_folder: Path, annotation_file: str
) -> list[ImageRecord]:
    images = content["images"]
    try:
        images = sorted(images, key=lambda image: image["id"])
    except TypeError:
        rule = "all integers or all strings"
        raise DataError(f"{annotation_file}: image ids are of different types ({rule})") from None
    # One join a folder, not one a file: Path objects for 118,000 images take a second.
    prefix = str(image_folder / "_")[:-1]
    return [
        ImageRecord(prefix + i["file_name"], i["id"], int(i["width"]), int(i["height"]))
        for i in images
    ]


def _annotations(
    content: dict[str, Any],
    records: list[ImageRecord],
    annotation_file: str,
    problems: list[Problem] | None,
) -> list[Annotations]:
    """Annotations of each record, in the file's order."""
    positions = {record.image_id: position for position, record in enumerate(records)}
    ids = sorted(category["id"] for category in content["categories"])
    labels = {category_id: label for label, category_id in enumerate(ids)}
    if len(labels) != len(ids):
        raise DataError(f"{annotation_file}: category ids are not unique: {ids}")
    rows: list[tuple[int, int, bool, bool]] = []
    boxes: list[list[float]] = []
    areas: list[float] = []
    for entry in content["annotations"]:
        problem = _annotation_problem(entry, positions, labels)
        if problem:
            where = (annotation_file, str(entry["image_id"]))
            report(Problem(*where, *problem), problems)
            continue
        flags = bool(entry.get("iscrowd", 0)), bool(entry.get("ignore", 0))
        rows.append((positions[entry["image_id"]], labels[entry["category_id"]], *flags))
        box = entry["bbox"]
        boxes.append(box)
        areas.append(entry["area"] if _is_number(entry.get("area")) else box[2] * box[3])
    return _split_by_image(rows, boxes, areas, len(records))


def _annotation_problem(
    entry: dict[str, Any], positions: dict[Any, int], labels: dict[Any, int]
) -> tuple[str, str, str] | None:
    """What is wrong, the value and the rule."""
    if entry["image_id"] not in positions:
        return "annotation of an unknown image", repr(entry["image_id"]), "images lists every id"
    if entry["category_id"] not in labels:
        value = repr(entry["category_id"])
        return "unknown category id", value, "categories lists every id"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "box", repr(box), "four numbers: x, y, width, height"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _split_by_image(
    rows: list[tuple[int, int, bool, bool]],
    boxes: list[list[float]],
    areas: list[float],
    count: int,
) -> list[Annotations]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    order = np.argsort(table[:, 0], kind="stable")
    table, corners = table[order], corners[order].astype(np.float32)
    area = np.array(areas, dtype=np.float64)[order]
    ends = np.cumsum(np.bincount(table[:, 0], minlength=count))
    starts = [0, *ends[:-1].tolist()]
    labels, crowd, difficult = table[:, 1].copy(), table[:, 2] != 0, table[:, 3] != 0
    return [
        Annotations(corners[a:b], labels[a:b], crowd[a:b], difficult[a:b], area[a:b])
        for a, b in zip(starts, ends.tolist(), strict=True)
    ]
