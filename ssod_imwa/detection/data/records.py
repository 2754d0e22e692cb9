"""What moves between data sets, streams, detectors and evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Origin:
    """Where the annotations of an image stand, and how: for messages to who has to edit them.

    Attributes:
        file: the annotation file.
        entry: name of an annotation in it, with a place for its number, such as "object {}".
        columns: names of the four numbers of a box in it.
        numbers: int64 (n,), of the annotations.
        boxes: float64 (n, 4), the numbers as they stand in the file.
    """

    file: str
    entry: str
    columns: str
    numbers: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Annotations:
    """Labels of one image.

    Attributes:
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the stored image.
        labels: int64 (n,), 0..C-1.
        crowd: bool (n,), COCO's iscrowd: never trained on, a crowd region when evaluated.
        difficult: bool (n,), VOC's difficult: trained on, ignored when evaluated.
        area: float64 (n,), square pixels of the objects' masks, by which COCO tells small, medium
            and large; None takes the boxes' areas.
        origin: where they stand; None if that is not known or boxes were changed since.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray | None = None
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set; `annotations` is None when the image is unlabeled."""

    file_name: str
    image_id: int | str
    width: int
    height: int
    annotations: Annotations | None = None


@dataclass(frozen=True)
class DetectionDataset:
    """A named list of images and the names of its classes (empty for unlabeled images).

    `list_file` is the file in which the images are listed, empty if there is none.
    """

    name: str
    records: tuple[ImageRecord, ...]
    classes: tuple[str, ...]
    list_file: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, indices: Sequence[int], *, labeled: bool = True) -> DetectionDataset:
        """The images at these positions, in this order; without labels if `labeled` is False."""
        records = [self.records[i] for i in indices]
        if not labeled:
            records = [replace(record, annotations=None) for record in records]
        return replace(self, records=tuple(records))


@dataclass
class Targets:
    """Boxes to learn: float32 (n, 4) x1 y1 x2 y2 in pixels of the view, int64 (n,) 0..C-1."""

    boxes: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Targets:
        return Targets(*(x.to(device, non_blocking=True) for x in (self.boxes, self.labels)))


@dataclass
class Detections:
    """What a detector found: boxes and labels as in `Targets`, scores float32 (n,) in [0, 1]."""

    boxes: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class View:
    """One image as one branch of a method sees it.

    Attributes:
        image: uint8 (3, H, W), RGB.
        matrix: float64 (3, 3), maps homogeneous pixels of the stored image to pixels of the view.
        targets: boxes of the view without crowds, or None when the image is unlabeled.
    """

    image: torch.Tensor
    matrix: torch.Tensor
    targets: Targets | None

    def to(self, device: torch.device | str) -> View:
        targets = None if self.targets is None else self.targets.to(device)
        return View(self.image.to(device, non_blocking=True), self.matrix, targets)
