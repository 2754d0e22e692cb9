"""What a teacher teaches: counts of its labels, of both tasks, without a device sync per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BINS = 10  # of the histogram of scores


@dataclass(frozen=True)
class LabelCounts:
    """Labels given over some iterations.

    Attributes:
        images: that could have been labeled.
        empty: of these, without any label.
        used: int64 (C,), labels of each class that the student learned from.
        judged: int64 (C,), of these, on images whose truth is known.
        right: int64 (C,), of these, the ones that are true.
        objects: int64 (C,), true objects of each class on those images.
        scores: int64 (BINS,), scores of all labels, used or not, by tenths of [0, 1].
    """

    images: int
    empty: int
    used: np.ndarray
    judged: np.ndarray
    right: np.ndarray
    objects: np.ndarray
    scores: np.ndarray

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> LabelCounts:
        (images, empty), *columns = rows
        return cls(images, empty, *(np.array(column, dtype=np.int64) for column in columns))

    def rows(self) -> list[list[int]]:
        """As lists, for a checkpoint or another process."""
        arrays = (self.used, self.judged, self.right, self.objects, self.scores)
        return [[self.images, self.empty], *(array.tolist() for array in arrays)]

    def __add__(self, other: LabelCounts) -> LabelCounts:
        return LabelCounts(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


class LabelStatistics:
    """Adds up what a method's teacher labels, until somebody takes the sums.

    Counts stay on the device of the labels; nothing waits for a GPU before `take`.

    Args:
        num_classes: C.

    Attributes:
        touched: whether anything was added since somebody set it to False.

    Example:
        >>> statistics = LabelStatistics(2)
        >>> statistics.add(
        ...     torch.tensor([0, 1, 1]),
        ...     torch.tensor([0.95, 0.9, 0.2]),
        ...     used=torch.tensor([True, True, False]),
        ...     images=2,
        ...     empty=0,
        ... )
        >>> statistics.take().used
        array([1, 1])
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.touched = False
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        labels: torch.Tensor,
        scores: torch.Tensor,
        *,
        used: torch.Tensor,
        images: int,
        empty: int | torch.Tensor,
        right: torch.Tensor | None = None,
        judged: torch.Tensor | None = None,
        objects: torch.Tensor | None = None,
    ) -> None:
        """Count the labels of some images.

        Args:
            labels: int64 (n,), classes 0..C-1.
            scores: floating (n,), in [0, 1].
            used: bool (n,), whether the student learns from it.
            images: how many they are of.
            empty: of these, without a used label.
            right: bool (n,), whether it is true; of no meaning where it is not judged.
            judged: bool (n,), whether the truth is known.
            objects: int64 (m,), classes of all true objects of images whose truth is known; -1
                stands for none.
        """
        self.touched = True
        self._count("used", labels, used, self.num_classes)
        tenths = (scores.float() * BINS).long().clamp(0, BINS - 1)
        self._count("scores", tenths, torch.ones_like(used), BINS)
        if judged is not None and right is not None:
            self._count("judged", labels, used & judged, self.num_classes)
            self._count("right", labels, used & judged & right, self.num_classes)
        if objects is not None:
            self._count("objects", objects.clamp(min=0), objects >= 0)
        self._sum("images", torch.as_tensor(images, device=labels.device).reshape(1))
        self._sum("empty", torch.as_tensor(empty, device=labels.device).reshape(1))

    def take(self) -> LabelCounts:
        """What was added since the last time."""
        sums, self._sums = self._sums, {}
        classes = np.zeros(self.num_classes, dtype=np.int64)
        counts: dict[str, Any] = dict.fromkeys(("used", "judged", "right", "objects"), classes)
        counts |= {"scores": np.zeros(BINS, dtype=np.int64), "images": 0, "empty": 0}
        for name, tensor in sums.items():
            array = tensor.cpu().numpy()
            counts[name] = int(array[0]) if name in ("images", "empty") else array
        return LabelCounts(**counts)

    def _count(
        self, name: str, places: torch.Tensor, weights: torch.Tensor, size: int | None = None
    ) -> None:
        # Not bincount, which waits for the GPU to tell how long its result is.
        table = torch.zeros(size or self.num_classes, dtype=torch.int64, device=places.device)
        self._sum(name, table.index_add_(0, places, weights.long()))

    def _sum(self, name: str, values: torch.Tensor) -> None:
        values = values.long()
        self._sums[name] = self._sums[name] + values if name in self._sums else values
