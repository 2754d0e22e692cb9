"""Detection's images as streams read them, with boxes that follow every view's geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssod_imwa.data.batches import Part
from ssod_imwa.data.order import hashed
from ssod_imwa.data.streams import FileImages, Step, Views
from ssod_imwa.data.transfer import SharedRecords
from ssod_imwa.detection.data.records import DetectionDataset, ImageRecord
from ssod_imwa.detection.data.views import make_record_views
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError


@dataclass(frozen=True)
class DetectionImages(FileImages):
    """Image files of any size, each of whose views is a `View`.

    Attributes:
        name: of the data set.
        records: what is read; without annotations the views have no targets.
    """

    name: str
    records: Sequence[ImageRecord]

    @classmethod
    def labeled(cls, dataset: DetectionDataset) -> DetectionImages:
        """A data set with its annotations.

        Raises:
            DataError: an image has none.
        """
        for record in dataset.records:
            if record.annotations is None:
                raise DataError(f"{record.file_name} of {dataset.name} has no annotations")
        return cls(dataset.name, dataset.records)

    @classmethod
    def unlabeled(cls, dataset: DetectionDataset) -> DetectionImages:
        """A data set whose annotations, if it has any, are hidden."""
        hidden = dataset.subset(range(len(dataset)), labeled=False)
        return cls(dataset.name, hidden.records)

    def __len__(self) -> int:
        return len(self.records)

    def shared(self) -> DetectionImages:
        return DetectionImages(self.name, SharedRecords(self.records))

    def make(self, index: int, slot: int, step: Step, views: Views) -> dict[str, Any]:
        generator = None
        if step.seed is not None:
            generator = counted_generator(
                step.seed, "views", hashed(step.stream), step.member, step.t, slot
            )
        return make_record_views(self.records[index], views, generator)

    def join(self, samples: list[dict[str, Any]], indices: torch.Tensor) -> Part:
        views = {name: [sample[name] for sample in samples] for name in samples[0]}
        return Part(views, None, indices)


def orientation_groups(records: Sequence[ImageRecord]) -> list[np.ndarray]:
    """Positions of wide (w > h) and of other images, without empty groups.

    Batches of one group save padding.
    """
    wide = np.array([record.width > record.height for record in records], dtype=bool)
    return [group for group in (np.flatnonzero(wide), np.flatnonzero(~wide)) if len(group)]
