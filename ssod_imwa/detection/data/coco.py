"""COCO's annotation files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ssod_imwa.data.image_files import MAX_EDGE
from ssod_imwa.data.problems import Problem, report
from ssod_imwa.data.text_files import is_text, read_flag, read_json
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord, Origin
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
        problems: receives the entries that cannot be represented (an image without a size, two
            categories of one name, an unknown image or category, a box that is not four numbers);
            without it the first of them raises.

    Raises:
        DataError: the file is no COCO file, or see `problems`.
    """
    content = read_coco_file(annotation_file, labeled=labeled, segmentations=False)
    return CocoReader(str(annotation_file), Path(image_folder), problems).dataset(
        name, content, labeled=labeled
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
        content = read_json(annotation_file, drop=None if segmentations else "segmentation")
    except FileNotFoundError:
        raise DataError(f"annotation file {annotation_file} does not exist") from None
    needed = ("images", "annotations", "categories") if labeled else ("images",)
    missing = [
        key
        for key in needed
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        use = "; without labels it can only be used as an unlabeled data set" if labeled else ""
        raise DataError(f"{annotation_file} has no list {' and '.join(missing)}{use}")
    return content


def to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """A data set as the content of a COCO file, boxes as x, y, width, height.

    Category ids are label + 1. Image ids are kept if all are integers (COCO's evaluators allow no
    others), else they are position + 1. `ignore` is 1 for VOC's difficult objects.
    """
    keep_ids = all(isinstance(record.image_id, int) for record in dataset.records)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
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


class CocoReader:
    """Turns the content of a COCO file into records, entry by entry.

    Args:
        annotation_file: for messages.
        image_folder: what the images' `file_name` is relative to.
        problems: see `load_coco`.
    """

    def __init__(
        self, annotation_file: str, image_folder: Path, problems: list[Problem] | None
    ) -> None:
        self.annotation_file = annotation_file
        self.image_folder = image_folder
        self.problems = problems

    def dataset(self, name: str, content: dict[str, Any], *, labeled: bool) -> DetectionDataset:
        """The data set; what cannot be represented is reported."""
        records = self._records(content["images"])
        if not labeled:
            return DetectionDataset(name, tuple(records), (), self.annotation_file)
        categories = self._categories(content["categories"])
        annotations = self._annotations(content["annotations"], records, list(categories))
        return DetectionDataset(
            name,
            tuple(
                ImageRecord(r.file_name, r.image_id, r.width, r.height, a)
                for r, a in zip(records, annotations, strict=True)
            ),
            tuple(categories.values()),
            self.annotation_file,
        )

    def _report(self, place: str, what: str, value: object, rule: str) -> None:
        report(Problem(self.annotation_file, place, what, repr(value), rule), self.problems)

    def _records(self, images: list[Any]) -> list[ImageRecord]:
        rows = []
        for number, image in enumerate(images):
            fault = _image_fault(image)
            if fault is None:
                rows.append(image)
            else:
                self._report(f"images[{number}]", *fault)
        try:
            rows.sort(key=lambda image: image["id"])
        except TypeError:
            rule = "all integers or all strings"
            raise DataError(
                f"{self.annotation_file}: image ids are of different types ({rule})"
            ) from None
        # One join a folder, not one a file: Path objects for 118,000 images take a second.
        prefix = str(self.image_folder / "_")[:-1]
        return [
            ImageRecord(prefix + i["file_name"], i["id"], int(i["width"]), int(i["height"]))
            for i in rows
        ]

    def _categories(self, categories: list[Any]) -> dict[Any, str]:
        """Names by id, in the order of the ids."""
        names: dict[Any, str] = {}
        for number, category in enumerate(categories):
            fault = _category_fault(category, names)
            if fault is None:
                names[category["id"]] = category["name"]
            else:
                self._report(f"categories[{number}]", *fault)
        try:
            return dict(sorted(names.items()))
        except TypeError:
            rule = "all integers or all strings"
            raise DataError(
                f"{self.annotation_file}: category ids are of different types ({rule})"
            ) from None

    def _annotations(
        self, entries: list[Any], records: list[ImageRecord], category_ids: list[Any]
    ) -> list[Annotations]:
        """Annotations of each record, in the file's order."""
        positions: dict[Any, int] = {}
        for position, record in enumerate(records):
            # An id that stands twice is the first image's: validation leaves out the other.
            positions.setdefault(record.image_id, position)
        labels = {category_id: label for label, category_id in enumerate(category_ids)}
        rows: list[tuple[int, int, bool, bool]] = []
        numbers: list[int] = []
        boxes: list[list[float]] = []
        areas: list[float] = []
        for number, entry in enumerate(entries):
            fault = _annotation_fault(entry, positions, labels)
            if fault is not None:
                image_id = entry_id(entry, "image_id")
                place = "" if image_id is None else f" of image {image_id}"
                self._report(f"annotations[{number}]{place}", *fault)
                continue
            flags = read_flag(entry.get("iscrowd", 0)), read_flag(entry.get("ignore", 0))
            rows.append((positions[entry["image_id"]], labels[entry["category_id"]], *flags))
            numbers.append(number)
            box = entry["bbox"]
            boxes.append(box)
            areas.append(entry["area"] if _is_number(entry.get("area")) else box[2] * box[3])
        return _split_by_image(
            self.annotation_file, rows, numbers, boxes, areas, count=len(records)
        )


Fault = tuple[str, object, str]  # what is wrong, the value and the rule


def _image_fault(image: Any) -> Fault | None:
    if not isinstance(image, dict):
        return "image", image, "an object with id, file_name, width and height"
    if not _is_id(image.get("id")):
        return "image id", image.get("id"), "an integer or a text"
    if not is_text(image.get("file_name")):
        return "file_name", image.get("file_name"), "the path of the image below its folder"
    for key in ("width", "height"):
        value = image.get(key)
        if not _is_number(value) or value != value // 1 or not 0 < value < MAX_EDGE:
            return key, value, "a whole number of pixels"
    return None


def _category_fault(category: Any, names: dict[Any, str]) -> Fault | None:
    if not isinstance(category, dict):
        return "category", category, "an object with id and name"
    category_id, name = category.get("id"), category.get("name")
    if not _is_id(category_id):
        return "category id", category_id, "an integer or a text"
    if category_id in names:
        return "category id", category_id, "must be unique"
    if not is_text(name):
        return "class name", name, "must be a text that is not empty"
    if name in names.values():
        return "class name", name, "must be unique"
    return None


def _annotation_fault(
    entry: Any, positions: dict[Any, int], labels: dict[Any, int]
) -> Fault | None:
    if not isinstance(entry, dict):
        return "annotation", entry, "an object with image_id, category_id and bbox"
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_id(image_id) or image_id not in positions:
        return "annotation of an unknown image", image_id, "must be an id of the list images"
    if not _is_id(category_id) or category_id not in labels:
        return "unknown category id", category_id, "must be an id of the list categories"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "box", box, "four numbers: x, y, width, height"
    for key in ("iscrowd", "ignore"):
        try:
            read_flag(entry.get(key, 0))
        except ValueError:
            return key, entry[key], "0, 1, true or false"
    return None


def entry_id(entry: Any, key: str) -> int | str | None:
    """The id in an image, category or annotation of a COCO file; None if there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if _is_id(value) else None


def _is_id(value: object) -> bool:
    return is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_number(value: object) -> TypeGuard[float]:
    # Python's integers have no end, NumPy's have; no pixel is that far out.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _split_by_image(
    annotation_file: str,
    rows: list[tuple[int, int, bool, bool]],
    numbers: list[int],
    boxes: list[list[float]],
    areas: list[float],
    *,
    count: int,
) -> list[Annotations]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    order = np.argsort(table[:, 0], kind="stable")
    written = np.array(boxes, dtype=np.float64).reshape(-1, 4)[order]
    entries = np.array(numbers, dtype=np.int64)[order]
    table = table[order]
    corners = np.concatenate([written[:, :2], written[:, 2:] + written[:, :2]], axis=1)
    corners = corners.astype(np.float32)
    area = np.array(areas, dtype=np.float64)[order]
    ends = np.cumsum(np.bincount(table[:, 0], minlength=count))
    starts = [0, *ends.tolist()][:count]
    where = (annotation_file, "annotations[{}]", "x, y, width, height")
    labels, crowd, difficult = table[:, 1].copy(), table[:, 2] != 0, table[:, 3] != 0
    return [
        Annotations(
            *(corners[a:b], labels[a:b], crowd[a:b], difficult[a:b], area[a:b]),
            origin=Origin(*where, entries[a:b], written[a:b]),
        )
        for a, b in zip(starts, ends.tolist(), strict=True)
    ]
