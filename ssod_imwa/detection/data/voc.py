"""PASCAL VOC's folder layout, also used by many other data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ssod_imwa.data.image_files import IMAGE_SUFFIXES, image_size
from ssod_imwa.data.problems import Problem, report
from ssod_imwa.detection.data.folder import unlabeled_records
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError

# detectron2's order, which is the alphabetical one.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


# Second column of VOC's lists of one class.
_ONE_CLASS_FLAG = re.compile(r"\s+(-1|0|1)\s*$")


def load_voc(
    root: str | Path,
    split: str,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    labeled: bool = True,
    problems: list[Problem] | None = None,
) -> DetectionDataset:
    """The images of a VOC split in the order of its list; an image's id is its name in the list.

    VOC counts pixels from 1 and includes the last one. As in detectron2, 1 is subtracted from xmin
    and ymin only, so that boxes are edges in 0..width and 0..height. A box whose corners are equal
    in the file keeps them: no real object is one pixel wide, and `validation` shall find it.

    Args:
        root: folder with `ImageSets/Main`, `JPEGImages` and, if labeled, `Annotations`.
        split: name of a list in `ImageSets/Main`, such as "trainval".
        name: name of the data set.
        classes: class names in label order; None takes all names that occur in any of the folder's
            annotation files, sorted, so that all splits agree.
        labeled: whether to read annotations; without, image sizes come from the image files.
        problems: receives images without a usable annotation file and objects that cannot be
            represented; without it the first of them raises.

    Raises:
        DataError: the list is missing, or see `problems`.
    """
    root = Path(root)
    names = _read_list(root / "ImageSets" / "Main" / f"{split}.txt")
    images = _image_files(root / "JPEGImages")
    paths = [images.get(n, str(root / "JPEGImages" / f"{n}.jpg")) for n in names]
    if not labeled:
        named = list(zip(names, paths, strict=True))
        return DetectionDataset(name, unlabeled_records(named, problems), ())
    if classes is None:
        classes = discover_classes(root / "Annotations")
    labels = {class_name: label for label, class_name in enumerate(classes)}
    found = (
        _record(root / "Annotations" / f"{n}.xml", n, path, labels, problems)
        for n, path in zip(names, paths, strict=True)
    )
    return DetectionDataset(name, tuple(r for r in found if r is not None), tuple(classes))


def discover_classes(folder: Path) -> tuple[str, ...]:
    """The sorted class names of all annotation files in a folder.

    Raises:
        DataError: there are none, or one is no XML.
    """
    names = {
        node.findtext("name", "").strip()
        for path in sorted(folder.glob("*.xml"))
        for node in _parse(path).findall("object")
    }
    if not names:
        raise DataError(f"{folder} has no annotation file with an object")
    return tuple(sorted(names))


def _read_list(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise DataError(f"list of images {path} does not exist (there are: {known})") from None
    return [_ONE_CLASS_FLAG.sub("", line).strip() for line in lines if line.strip()]


def _image_files(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return {path.stem: str(path) for path in files}


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} is no annotation file: {error}") from error


def _record(
    annotation_file: Path,
    image_id: str,
    image_path: str,
    labels: dict[str, int],
    problems: list[Problem] | None,
) -> ImageRecord | None:
    try:
        tree = _parse(annotation_file)
        width, height = _size(tree, image_path)
    except DataError as error:
        rule = "every labeled image has an XML file and a size"
        report(Problem(str(annotation_file), image_id, "no annotation", str(error), rule), problems)
        return None
    rows: list[tuple[float, float, float, float]] = []
    numbers: list[tuple[int, bool]] = []
    for node in tree.findall("object"):
        name, box = node.findtext("name", "").strip(), _box(node)
        if name not in labels or box is None:
            found = ("object without a box of four numbers", name, "xmin, ymin, xmax, ymax")
            if name not in labels:
                found = ("unknown class", repr(name), f"one of {', '.join(labels)}")
            report(Problem(str(annotation_file), image_id, *found), problems)
            continue
        rows.append(box)
        numbers.append((labels[name], node.findtext("difficult", "0").strip() == "1"))
    annotations = Annotations(
        boxes=np.array(rows, dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for label, _ in numbers], dtype=np.int64),
        crowd=np.zeros(len(rows), dtype=bool),
        difficult=np.array([difficult for _, difficult in numbers], dtype=bool),
    )
    return ImageRecord(image_path, image_id, width, height, annotations)


def _size(tree: ElementTree.Element, image_path: str) -> tuple[int, int]:
    try:
        size = int(tree.findtext("size/width", "0")), int(tree.findtext("size/height", "0"))
    except ValueError:
        size = 0, 0
    # Some annotation tools write no size, or zeros.
    return size if min(size) > 0 else image_size(image_path)


def _box(node: ElementTree.Element) -> tuple[float, float, float, float] | None:
    try:
        x1, y1, x2, y2 = (
            float(node.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    if x2 <= x1 or y2 <= y1:
        return x1, y1, x2, y2
    return x1 - 1, y1 - 1, x2, y2
