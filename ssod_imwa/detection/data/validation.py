"""Everything that can be wrong in a data set, and what is done about it."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ssod_imwa.data import image_files
from ssod_imwa.data.image_files import (
    DECODING_ERRORS,
    SIDEWAYS,
    check_pixels,
    orientation,
    upright_size,
)
from ssod_imwa.data.problems import Problem
from ssod_imwa.data.text_files import folded, is_text
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError, one_line

logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")

# Annotation tools round to pixels, so a box may pass the image's edge by this much; it is clipped.
EDGE_TOLERANCE = 1.0

# Images have at least so many pixels along each edge where boxes of 0..1 cannot be pixels.
MIN_EDGE_OF_PIXELS = 8
# Share of boxes that pass an edge from which all of them look like corners.
SHARE_OF_CORNERS = 0.2

_SHOWN = 5
_RESTORE = "restore the file, or take the image out of the data set"
_NAME_RULE = "must be a text that is not empty"
_NEEDS_A_CLASS = "a labeled data set needs at least 1"


def find_problems(dataset: DetectionDataset, *, read_pixels: bool) -> list[Problem]:
    """Everything wrong in a data set.

    Args:
        dataset: as a reader returned it, before `apply_policy`.
        read_pixels: open and decode every image, too. Without it only file sizes are looked at,
            which takes about a second for COCO.
    """
    kinds = (_id_problems, _name_problems, _unit_problems, _box_problems, _class_problems)
    problems = [problem for find in kinds for problem in find(dataset)]
    for position in range(len(dataset)):
        problems += _file_problems(dataset, position, read_pixels=read_pixels)
    return problems


def check_readable(dataset: DetectionDataset) -> None:
    """Make sure that the images can be read and have their annotated sizes, at 0.1 ms each.

    Raises:
        DataError: see `image_files.check_readable`.
    """
    records = dataset.records
    image_files.check_readable(
        dataset.name,
        ((record.file_name, (record.width, record.height)) for record in records),
        checker=f"tools/check_dataset.py {dataset.name}",
    )


def apply_policy(
    dataset: DetectionDataset,
    *,
    on_bad_record: str = "error",
    problems: Sequence[Problem] = (),
) -> DetectionDataset:
    """The data set without its bad records; boxes are clipped to their image.

    Boxes that pass the edge by no more than `EDGE_TOLERANCE` pixels are clipped without a word.
    With "skip", images that are missing, empty or listed twice and boxes that have no area, no
    class or lie outside are left out, and boxes that pass the edge by more are clipped; each kind
    is logged with its count. A class without boxes is logged in both cases.

    Args:
        dataset: as a reader returned it.
        on_bad_record: "error" or "skip".
        problems: what the reader collected: annotations it could not represent.

    Raises:
        DataError: there are bad records and the policy is "error", or no image is left.
    """
    if on_bad_record not in POLICIES:
        raise ValueError(f"on_bad_record = {on_bad_record!r} is not allowed (one of {POLICIES})")
    everything = [*problems, *find_problems(dataset, read_pixels=False)]
    for line in _warning_lines([problem for problem in everything if problem.level == "warning"]):
        logger.warning("%s: %s", dataset.name, line)
    errors = [problem for problem in everything if problem.level == "error"]
    if errors and on_bad_record == "error":
        raise DataError(_summary(dataset.name, errors))
    for kind, count in sorted(Counter(problem.what for problem in errors).items()):
        logger.warning("%s: skipped %d x %s", dataset.name, count, kind)
    dataset = _without(dataset, errors)
    if not dataset.records:
        reason = f"; {len(errors)} problems, {_listed(errors)}" if errors else ""
        raise DataError(f"data set {dataset.name} has no images (at least 1 is needed){reason}")
    if _lacks_classes(dataset):
        raise DataError(
            f"data set {dataset.name} has no class ({_NEEDS_A_CLASS}); {_listed(errors)}"
        )
    return dataset


def _warning_lines(warnings: Sequence[Problem]) -> Iterator[str]:
    """A line for each kind: with 80 classes, 61 without boxes are one thing to know."""
    kinds: dict[str, list[Problem]] = {}
    for warning in warnings:
        kinds.setdefault(warning.what, []).append(warning)
    for what, group in kinds.items():
        if len(group) == 1:
            yield str(group[0])
            continue
        shared = len({problem.rule for problem in group}) == 1
        values = [p.value if shared else f"{p.value} ({p.rule})" for p in group[:_SHOWN]]
        more = f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        rule = f" ({group[0].rule})" if shared else ""
        yield one_line(f"{len(group)} x {what}: {', '.join(values)}{more}{rule}")


def _summary(name: str, errors: list[Problem]) -> str:
    return (
        f"data set {name} has bad records ({len(errors)}): {_listed(errors)} (mend them, or leave "
        f"them out with DATASETS.ON_BAD_RECORD skip; tools/check_dataset.py {name} --all lists all)"
    )


def _listed(errors: list[Problem]) -> str:
    """The first problems, each with its file, and how many more there are."""
    listed = "; ".join(f"{problem.file}: {problem}" for problem in errors[:_SHOWN])
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return listed + more


def _without(dataset: DetectionDataset, errors: Iterable[Problem]) -> DetectionDataset:
    bad_images = {p.position for p in errors if p.position >= 0 and p.box < 0}
    bad_boxes: dict[int, set[int]] = {}
    for problem in errors:
        if problem.box >= 0 and problem.what != _PASSES_EDGE:
            bad_boxes.setdefault(problem.position, set()).add(problem.box)
    changed = _passing_an_edge(dataset) | set(bad_boxes)
    records = [
        record
        if record.annotations is None or position not in changed
        else _cleaned(record, record.annotations, bad_boxes.get(position, set()))
        for position, record in enumerate(dataset.records)
        if position not in bad_images
    ]
    return replace(dataset, records=tuple(records))


def _cleaned(record: ImageRecord, old: Annotations, bad_boxes: set[int]) -> ImageRecord:
    """The record with the annotations `old`, which are its own, less the bad boxes."""
    keep = [number for number in range(len(old)) if number not in bad_boxes]
    limits = np.array([record.width, record.height] * 2, dtype=np.float32)
    annotations = Annotations(
        boxes=np.clip(old.boxes[keep], 0, limits),
        labels=old.labels[keep],
        crowd=old.crowd[keep],
        difficult=old.difficult[keep],
        area=None if old.area is None else old.area[keep],
    )
    return replace(record, annotations=annotations)


def _id_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    if not dataset.records:
        where = dataset.list_file or dataset.name
        yield Problem(where, "", "empty split", "0 images", "at least 1 is needed")
    first: dict[int | str, str] = {}
    files: dict[str, int | str] = {}
    for position, record in enumerate(dataset.records):
        file = dataset.list_file or record.file_name
        if record.image_id in first:
            rule = f"must be unique; also that of {first[record.image_id]}"
            value = repr(record.image_id)
            yield _problem(record, position, "duplicate id", value, rule, file=file)
        elif record.file_name in files:
            value = f"{record.file_name}, also that of image {files[record.file_name]}"
            rule, what = "counts twice", "duplicate file"
            yield _problem(record, position, what, value, rule, file=file, level="note")
        files.setdefault(record.file_name, record.image_id)
        first.setdefault(record.image_id, record.file_name)


def _name_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    """Names of classes that are no texts, stand twice, or differ by case or spaces alone."""
    if _lacks_classes(dataset):
        where = dataset.list_file or dataset.name
        yield Problem(where, "", "no class", "0 classes", _NEEDS_A_CLASS)
    alike: dict[str, str] = {}
    for label, name in enumerate(dataset.classes):
        place = f"class {label}"
        if not is_text(name):
            yield Problem(dataset.name, place, "class name", repr(name), _NAME_RULE)
            continue
        other = alike.setdefault(folded(name), name)
        if name in dataset.classes[:label]:
            yield Problem(dataset.name, place, "class name", repr(name), "names must be unique")
        elif other != name:
            rule = f"differs from {other!r} by case or spaces alone; are they one class?"
            yield Problem(dataset.name, place, "class name", repr(name), rule, level="warning")


def _lacks_classes(dataset: DetectionDataset) -> bool:
    labeled = any(record.annotations is not None for record in dataset.records)
    return labeled and not dataset.classes


def _unit_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    """Boxes that are all of another form than x, y, width, height or corners in pixels."""
    table = _AllBoxes(dataset)
    boxes, limits = table.boxes, table.limits
    if not len(boxes) or not np.isfinite(boxes).all():
        return
    if boxes.min() >= 0 and boxes.max() <= 1 and limits.min() > MIN_EDGE_OF_PIXELS:
        rule = "must be in pixels; multiply by width and height"
        value = f"all {len(boxes)} boxes lie in 0..1"
        yield Problem(dataset.name, "", "boxes look like fractions", value, rule, level="warning")
    # What a reader of x, y, width, height made of corners: the second corner lies behind the edge.
    sizes = boxes[:, 2:] - boxes[:, :2]
    passes = (boxes[:, 2:] > limits[:, 2:] + EDGE_TOLERANCE).any(axis=1)
    as_corners = (sizes > boxes[:, :2]).all() and (sizes <= limits[:, 2:] + EDGE_TOLERANCE).all()
    if as_corners and passes.mean() > SHARE_OF_CORNERS:
        rule = "must be x, y, width, height; subtract the first corner from the second"
        value = (
            f"{passes.sum()} of {len(boxes)} boxes pass their image's edge, as corners none does"
        )
        yield Problem(dataset.name, "", "boxes look like x1 y1 x2 y2", value, rule, level="warning")


def _class_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    labeled = [r.annotations for r in dataset.records if r.annotations is not None]
    if not labeled:
        return
    labels = np.concatenate([a.labels[~a.crowd] for a in labeled])
    present = set(labels.tolist())
    for label, name in enumerate(dataset.classes):
        if label not in present:
            rule = "it can be neither learned from nor evaluated on these images"
            yield Problem(dataset.name, "", "class without boxes", name, rule, level="warning")


_PASSES_EDGE = "box passes the image's edge"
_OUTSIDE = "box outside the image"


class _AllBoxes:
    """The boxes of all images in one table: a NumPy call for each of COCO's images takes seconds.

    Attributes:
        position, number: int64 (n,), place of the box's image and of the box in it.
        boxes, limits: float32 (n, 4), x1 y1 x2 y2 and width, height, width, height of the image.
        labels: int64 (n,).
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        # The empty first entries keep the shapes of a data set without labels.
        flags = np.zeros(0, bool)
        none = Annotations(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), flags, flags)
        each = [none, *(record.annotations or none for record in dataset.records)]
        counts = [len(annotations) for annotations in each]
        self.boxes = np.concatenate([annotations.boxes for annotations in each])
        self.labels = np.concatenate([annotations.labels for annotations in each])
        self.position = np.repeat(np.arange(-1, len(dataset)), counts)
        self.number = np.arange(len(self.boxes)) - np.repeat(np.cumsum([0, *counts])[:-1], counts)
        sizes = [(record.width, record.height) * 2 for record in dataset.records]
        self.limits = np.array(sizes, np.float32).reshape(-1, 4)[self.position]


def _passing_an_edge(dataset: DetectionDataset) -> set[int]:
    """Positions of the images with a box that is not inside."""
    table = _AllBoxes(dataset)
    passes = ((table.boxes < 0) | (table.boxes > table.limits)).any(axis=1)
    return set(table.position[passes].tolist())


def _box_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    table = _AllBoxes(dataset)
    faults = _wrong_boxes(table.boxes, table.labels, table.limits, len(dataset.classes))
    for index, what, rule in faults:
        position = int(table.position[index])
        record = dataset.records[position]
        assert record.annotations is not None  # it has this box
        number = int(table.number[index])
        place, value = _written_box(record.annotations, number)
        if what in (_PASSES_EDGE, _OUTSIDE):
            value += f" in {record.width} x {record.height}"
        yield Problem(
            _annotation_file(dataset, record),
            f"{place} of image {record.image_id}",
            *(what, value, rule),
            position=position,
            box=number,
        )


def _written_box(annotations: Annotations, number: int) -> tuple[str, str]:
    """Name and coordinates of a box as they stand in its file."""
    origin = annotations.origin
    if origin is None:
        place, columns, box = f"boxes[{number}]", "x1, y1, x2, y2", annotations.boxes[number]
    else:
        place = origin.entry.format(origin.numbers[number])
        columns, box = origin.columns, origin.boxes[number]
    return place, f"{columns} = {', '.join(f'{x:.10g}' for x in box.tolist())}"


def _annotation_file(dataset: DetectionDataset, record: ImageRecord) -> str:
    """The file in which an image's annotations stand, as far as it is known."""
    if record.annotations is not None and record.annotations.origin is not None:
        return record.annotations.origin.file
    return dataset.list_file or record.file_name


def _wrong_boxes(
    boxes: np.ndarray, labels: np.ndarray, limits: np.ndarray, classes: int
) -> Iterator[tuple[int, str, str]]:
    """Number of each wrong box, its first fault and the rule."""
    finite = np.isfinite(boxes).all(axis=1)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    clipped = np.clip(np.where(np.isfinite(boxes), boxes, 0), 0, limits)
    inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    fits = (np.abs(clipped - boxes) <= EDGE_TOLERANCE).all(axis=1)
    known = (labels >= 0) & (labels < classes)
    faults = (
        (~finite, "box is not finite", "must be four finite numbers"),
        (~has_area, "box without area", "width and height must be above 0"),
        (~inside, _OUTSIDE, "must overlap its image"),
        (~fits, _PASSES_EDGE, f"may pass it by at most {EDGE_TOLERANCE:g} pixel"),
        (~known, "box of an unknown class", f"its label must be 0..{classes - 1}"),
    )
    open_ = np.ones(len(boxes), dtype=bool)
    for wrong, what, rule in faults:
        for index in np.flatnonzero(wrong & open_):
            yield int(index), what, rule
        open_ &= ~wrong


def _file_problems(dataset: DetectionDataset, position: int, *, read_pixels: bool) -> list[Problem]:
    record = dataset.records[position]
    try:
        status = os.stat(record.file_name)
    except (OSError, ValueError):
        status = None
    if status is None or stat.S_ISDIR(status.st_mode):
        return [_problem(record, position, "missing image", "there is no such file", _RESTORE)]
    if status.st_size == 0:
        return [_problem(record, position, "empty image file", "0 bytes", _RESTORE)]
    return list(_pixel_problems(dataset, position)) if read_pixels else []


def _pixel_problems(dataset: DetectionDataset, position: int) -> Iterator[Problem]:
    record = dataset.records[position]
    try:
        with Image.open(record.file_name) as image:
            size, mode, turned = upright_size(image), image.mode, orientation(image)
            stored = size[::-1] if turned in SIDEWAYS else size
            check_pixels(image)
            image.load()
            # Not Pillow's extrema, which it does not know of big-endian pixels.
            dark = mode.startswith("I") and np.asarray(image).max() < 256
    except DECODING_ERRORS as error:
        reason = str(error) or type(error).__name__
        yield _problem(record, position, "unreadable image", reason, _RESTORE)
        return
    if size != (record.width, record.height):
        value = (
            f"{record.file_name} has {size[0]} x {size[1]} pixels, its annotation says "
            f"{record.width} x {record.height}"
        )
        rule = "correct the annotation: width and height are those of the upright image"
        file = _annotation_file(dataset, record)
        yield _problem(record, position, "wrong size", value, rule, file=file)
    if turned != 1:
        value = f"{stored[0]} x {stored[1]} in the file, orientation {turned}"
        rule = "turned upright when read"
        yield _problem(record, position, "turned by EXIF", value, rule, level="note")
    if dark:
        rule = "the high byte is read, so it is black; save it with 8 bits"
        yield _problem(record, position, "16-bit image of 0..255", mode, rule, level="warning")
    if mode != "RGB":
        yield _problem(record, position, "not RGB", mode, "converted when read", level="note")


def _problem(
    record: ImageRecord,
    position: int,
    what: str,
    value: str,
    rule: str,
    *,
    file: str = "",
    level: str = "error",
) -> Problem:
    """A problem of an image as a whole, in its own file unless `file` says otherwise."""
    place = f"image {record.image_id}"
    return Problem(file or record.file_name, place, what, value, rule, level, position)
