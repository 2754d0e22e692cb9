"""Everything that can be wrong in a data set, and what is done about it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ssod_imwa.data import image_files
from ssod_imwa.data.image_files import (
    DECODING_ERRORS,
    check_pixels,
    upright_size,
)
from ssod_imwa.data.problems import Problem
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)

POLICIES = ("error", "skip")

# Annotation tools round to pixels, so a box may pass the image's edge by this much; it is clipped.
EDGE_TOLERANCE = 1.0

# Images have at least so many pixels along each edge where boxes of 0..1 cannot be pixels.
MIN_EDGE_OF_PIXELS = 8
# Share of boxes that pass an edge from which all of them look like corners.
SHARE_OF_CORNERS = 0.2

_SHOWN = 5


def find_problems(dataset: DetectionDataset, *, read_pixels: bool) -> list[Problem]:
    """Everything wrong in a data set.

    Args:
        dataset: as a reader returned it, before `apply_policy`.
        read_pixels: open and decode every image, too. Without it only file sizes are looked at,
            which takes about a second for COCO.
    """
    kinds = (_id_problems, _name_problems, _unit_problems, _box_problems, _class_problems)
    problems = [problem for find in kinds for problem in find(dataset)]
    for position, record in enumerate(dataset.records):
        problems += _file_problems(record, position, read_pixels=read_pixels)
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
    for warning in (problem for problem in everything if problem.level == "warning"):
        logger.warning("%s: %s", dataset.name, warning)
    errors = [problem for problem in everything if problem.level == "error"]
    if errors and on_bad_record == "error":
        raise DataError(_summary(dataset.name, errors))
    for kind, count in sorted(Counter(problem.what for problem in errors).items()):
        logger.warning("%s: skipped %d x %s", dataset.name, count, kind)
    dataset = _without(dataset, errors)
    if not dataset.records:
        reason = f"; {len(errors)} problems, {_listed(errors)}" if errors else ""
        raise DataError(f"data set {dataset.name} has no images (at least 1 is needed){reason}")
    return dataset


def _summary(name: str, errors: list[Problem]) -> str:
    return (
        f"data set {name} has bad records ({len(errors)}): {_listed(errors)} (mend them, or leave "
        f"them out with DATASETS.ON_BAD_RECORD skip; tools/check_dataset.py {name} lists all)"
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
        yield Problem(dataset.name, "", "empty split", "0 images", "at least 1 is needed")
    first: dict[int | str, str] = {}
    files: dict[str, int | str] = {}
    for position, record in enumerate(dataset.records):
        if record.file_name in files:
            rule = f"each file is listed once; also that of image {files[record.file_name]}"
            yield _problem(record, position, "duplicate file", record.file_name, rule)
        files.setdefault(record.file_name, record.image_id)
        if record.image_id in first:
            rule = f"ids are unique; also that of {first[record.image_id]}"
            yield _problem(record, position, "duplicate id", repr(record.image_id), rule)
        first.setdefault(record.image_id, record.file_name)


def _name_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    """Names of classes that are no texts, stand twice, or differ by case alone."""
    folded: dict[str, str] = {}
    for label, name in enumerate(dataset.classes):
        place = f"class {label}"
        if not isinstance(name, str) or not name.strip():
            yield Problem(dataset.name, place, "class name", repr(name), "a text that is not empty")
            continue
        other = folded.setdefault(name.casefold(), name)
        if name in dataset.classes[:label]:
            yield Problem(dataset.name, place, "class name", repr(name), "names are unique")
        elif other != name:
            rule = f"differs from {other!r} by case alone; are they one class?"
            yield Problem(dataset.name, place, "class name", repr(name), rule, level="warning")


def _unit_problems(dataset: DetectionDataset) -> Iterator[Problem]:
    """Boxes that are all of another form than x, y, width, height or corners in pixels."""
    table = _AllBoxes(dataset)
    boxes, limits = table.boxes, table.limits
    if not len(boxes) or not np.isfinite(boxes).all():
        return
    if boxes.min() >= 0 and boxes.max() <= 1 and limits.min() > MIN_EDGE_OF_PIXELS:
        rule = "boxes are in pixels; multiply by width and height"
        value = f"all {len(boxes)} boxes lie in 0..1"
        yield Problem(dataset.name, "", "boxes look like fractions", value, rule, level="warning")
    # What a reader of x, y, width, height made of corners: the second corner lies behind the edge.
    sizes = boxes[:, 2:] - boxes[:, :2]
    passes = (boxes[:, 2:] > limits[:, 2:] + EDGE_TOLERANCE).any(axis=1)
    as_corners = (sizes > boxes[:, :2]).all() and (sizes <= limits[:, 2:] + EDGE_TOLERANCE).all()
    if as_corners and passes.mean() > SHARE_OF_CORNERS:
        rule = "boxes are x, y, width, height; subtract the first corner from the second"
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


class _AllBoxes:
    """The boxes of all images in one table: a NumPy call for each of COCO's images takes seconds.

    Attributes:
        position, number: int64 (n,), place of the box's image and of the box in it.
        boxes, limits: float32 (n, 4), x1 y1 x2 y2 and width, height, width, height of the image.
        labels: int64 (n,).
    """

    def __init__(self, dataset: DetectionDataset) -> None:
        # The empty first entries keep the shapes of a data set without labels.
        none = Annotations(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), *[np.zeros(0)] * 2)
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
        value = str([float(f"{x:.6g}") for x in table.boxes[index]])
        if what == _PASSES_EDGE:
            value += f" in {record.width} x {record.height}"
        yield _problem(record, position, what, value, rule, box=int(table.number[index]))


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
        (~finite, "box is not finite", "every coordinate is a number"),
        (~has_area, "box without area", "x2 > x1 and y2 > y1"),
        (~inside, "box outside the image", "boxes lie inside their image"),
        (~fits, _PASSES_EDGE, f"by at most {EDGE_TOLERANCE:g} pixel"),
        (~known, "box of an unknown class", f"labels are 0..{classes - 1}"),
    )
    open_ = np.ones(len(boxes), dtype=bool)
    for wrong, what, rule in faults:
        for index in np.flatnonzero(wrong & open_):
            yield int(index), what, rule
        open_ &= ~wrong


def _file_problems(record: ImageRecord, position: int, *, read_pixels: bool) -> list[Problem]:
    try:
        size = Path(record.file_name).stat().st_size
    except OSError:
        rule = "every listed image exists"
        return [_problem(record, position, "missing image", record.file_name, rule)]
    if size == 0:
        rule = "it holds an image"
        return [_problem(record, position, "empty image file", record.file_name, rule)]
    return list(_pixel_problems(record, position)) if read_pixels else []


def _pixel_problems(record: ImageRecord, position: int) -> Iterator[Problem]:
    try:
        with Image.open(record.file_name) as image:
            size, stored, mode = upright_size(image), image.size, image.mode
            check_pixels(image)
            image.load()
            dark = mode.startswith("I") and image.getextrema()[1] < 256
    except DECODING_ERRORS as error:
        rule = "it can be decoded"
        yield _problem(record, position, "unreadable image", f"{record.file_name}: {error}", rule)
        return
    if size != (record.width, record.height):
        value = f"file {size[0]} x {size[1]}, annotation {record.width} x {record.height}"
        yield _problem(record, position, "wrong size", value, "both are the same")
    if size != stored:
        rule = "turned upright when read"
        yield _problem(record, position, "turned by EXIF", record.file_name, rule, level="note")
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
    level: str = "error",
    box: int = -1,
) -> Problem:
    place = f"image {record.image_id}"
    return Problem(record.file_name, place, what, value, rule, level, position, box)
