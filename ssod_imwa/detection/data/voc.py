"""PASCAL VOC's folder layout, also used by many other data sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ssod_imwa.data.image_files import MAX_EDGE, image_paths, image_size
from ssod_imwa.data.problems import Problem, report
from ssod_imwa.data.text_files import read_flag, read_text, read_xml
from ssod_imwa.detection.data.folder import unlabeled_records
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord, Origin
from ssod_imwa.errors import DataError

# detectron2's order, which is the alphabetical one.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


# Second column of VOC's lists of one class.
_ONE_CLASS_FLAGS = ("-1", "0", "1")

# Beyond the largest whole number that NumPy has; no pixel is that far out.
_MAX_COORDINATE = 2.0**63


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
    images = _image_files(root / "JPEGImages")
    list_file = root / "ImageSets" / "Main" / f"{split}.txt"
    names = _read_list(list_file, images)
    for image_id in names:
        if len(images.get(image_id, ())) > 1:
            files = ", ".join(path.name for path in images[image_id])
            rule = "must be one file"
            place = f"image {image_id}"
            report(Problem(str(root / "JPEGImages"), place, "several files", files, rule), problems)
    paths = [str(images.get(n, [root / "JPEGImages" / f"{n}.jpg"])[0]) for n in names]
    if not labeled:
        named = list(zip(names, paths, strict=True))
        return DetectionDataset(name, unlabeled_records(named, problems), (), str(list_file))
    if classes is None:
        classes = discover_classes(root / "Annotations", problems)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    each = (
        _record(root / "Annotations" / f"{n}.xml", n, path, labels, problems)
        for n, path in zip(names, paths, strict=True)
    )
    records = tuple(record for record in each if record is not None)
    return DetectionDataset(name, records, tuple(classes), str(list_file))


def discover_classes(folder: Path, problems: list[Problem] | None = None) -> tuple[str, ...]:
    """The sorted class names of all annotation files in a folder.

    Args:
        folder: of XML files.
        problems: receives a warning for each file that cannot be read; without it the first raises.

    Raises:
        DataError: there is no name, or see `problems`.
    """
    names = set()
    for path in sorted(folder.glob("*.xml")):
        if path.name.startswith("."):  # what macOS leaves on other disks
            continue
        try:
            names |= {_class_name(node) for node in read_xml(path).findall("object")}
        except DataError as error:
            rule = "its classes are not known"
            problem = Problem(str(path), "", "unreadable annotation", str(error), rule, "warning")
            report(problem, problems)
    names.discard("")  # reported where the object is read
    if not names:
        raise DataError(f"{folder} has no annotation file with an object")
    return tuple(sorted(names))


def _annotation(path: Path) -> ElementTree.Element:
    root = read_xml(path)
    if root.tag != "annotation":  # of another tool, in which no object would be found
        raise DataError(f"{path} is no VOC file: its root is <{root.tag}> (must be <annotation>)")
    return root


def _class_name(node: ElementTree.Element) -> str:
    return node.findtext("name", "").strip()


def _read_list(path: Path, images: Mapping[str, object]) -> list[str]:
    """Names of images, without the flags of a list of one class.

    Which it is, the images tell: "cell 1" is the image of this name if there is one, else "cell".
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise DataError(f"list of images {path} does not exist (there are: {known})") from None
    return [_unflagged(line, images) for line in lines]


def _unflagged(line: str, images: Mapping[str, object]) -> str:
    name, *flag = line.rsplit(maxsplit=1)
    has_flag = flag and flag[0] in _ONE_CLASS_FLAGS
    return name if has_flag and name in images and line not in images else line


def _image_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder by their names without suffix."""
    if not os.path.isdir(folder):
        raise DataError(f"image folder {folder} does not exist")
    files: dict[str, list[Path]] = {}
    for path in image_paths(folder):
        if path.parent == folder:
            files.setdefault(path.stem, []).append(path)
    return files


def _record(
    annotation_file: Path,
    image_id: str,
    image_path: str,
    labels: dict[str, int],
    problems: list[Problem] | None,
) -> ImageRecord | None:
    place = f"image {image_id}"
    try:
        tree = _annotation(annotation_file)
        width, height = _size(tree, image_path)
    except DataError as error:
        rule = "every labeled image needs an XML file and a size"
        report(Problem(str(annotation_file), place, "no annotation", str(error), rule), problems)
        return None
    boxes: list[tuple[float, float, float, float]] = []
    numbers: list[int] = []
    flags: list[tuple[int, bool]] = []
    for number, node in enumerate(tree.findall("object"), start=1):
        fault = _object_fault(node, labels)
        if fault is not None:
            where = f"object {number} of {place}"
            report(Problem(str(annotation_file), where, *fault), problems)
            continue
        box = _box(node)
        assert box is not None  # which would be a fault
        boxes.append(box)
        numbers.append(number)
        flags.append((labels[_class_name(node)], read_flag(node.findtext("difficult", "0"))))
    written = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    annotations = Annotations(
        boxes=_edges(written).astype(np.float32),
        labels=np.array([label for label, _ in flags], dtype=np.int64),
        crowd=np.zeros(len(boxes), dtype=bool),
        difficult=np.array([difficult for _, difficult in flags], dtype=bool),
        origin=Origin(
            str(annotation_file),
            "object {}",
            "xmin, ymin, xmax, ymax",
            np.array(numbers, dtype=np.int64),
            written,
        ),
    )
    return ImageRecord(image_path, image_id, width, height, annotations)


def _object_fault(node: ElementTree.Element, labels: dict[str, int]) -> tuple[str, str, str] | None:
    """What is wrong, the value and the rule."""
    name = _class_name(node)
    if not name:
        return "object without a class", "no name", "name must be a text that is not empty"
    if name not in labels:
        return "unknown class", repr(name), f"one of {', '.join(labels)}"
    if _box(node) is None:
        return "object without a box of four numbers", name, "xmin, ymin, xmax, ymax"
    try:
        read_flag(node.findtext("difficult", "0"))
    except ValueError as error:
        return "difficult", name, str(error)
    return None


def _size(tree: ElementTree.Element, image_path: str) -> tuple[int, int]:
    """Width and height in the file, or those of the image where it has none or zeros.

    Raises:
        DataError: they are no numbers of pixels, or the image cannot be read.
    """
    texts = [(tree.findtext(f"size/{key}") or "0").strip() for key in ("width", "height")]
    try:
        width, height = (float(text) for text in texts)
    except ValueError:
        width = height = -1.0
    if width == height == 0 or 0 in (width, height):
        return image_size(image_path)
    if not all(0 < edge < MAX_EDGE and edge == int(edge) for edge in (width, height)):
        raise DataError(f"size {texts[0]} x {texts[1]} is not allowed (must be numbers of pixels)")
    return int(width), int(height)


def _box(node: ElementTree.Element) -> tuple[float, float, float, float] | None:
    """The corners as they stand in the file; None if they are not four numbers."""
    try:
        x1, y1, x2, y2 = (
            float(node.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    corners = (x1, y1, x2, y2)
    return corners if all(abs(edge) < _MAX_COORDINATE for edge in corners) else None


def _edges(corners: np.ndarray) -> np.ndarray:
    """Boxes of pixels counted from 1, the last one included, as edges; see `load_voc`."""
    has_area = (corners[:, 2:] > corners[:, :2]).all(axis=1, keepdims=True)
    return corners - has_area * np.array([1.0, 1.0, 0.0, 0.0])
