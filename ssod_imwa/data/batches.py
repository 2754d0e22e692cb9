"""What a training step reads: the images of each stream, in the views that the method declares.

A batch knows no box and no class::

    batch["labeled"].views["weak"]      # a list of the task's own views, or one tensor for all
    batch["labeled"].targets            # one for each image, where the views do not have their own
    batch.to(device).split(2)           # micro-batches, for gradient accumulation
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one stream in a batch.

    Attributes:
        views: by name, all of the same B images: a tensor (B, ...), or a list of B objects with
            `to(device)`, such as images of different sizes.
        targets: (B,), what is to be learned of each image; None where views have their own targets,
            or there are none.
        indices: int64 (B,), positions in the stream's data set.
    """

    views: dict[str, Any]
    targets: Any
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> Part:
        """On the device; copies from page-locked memory do not wait."""

        def moved(values: Any) -> Any:
            if isinstance(values, torch.Tensor):
                return values.to(device, non_blocking=True)
            return [value.to(device) for value in values]

        return self._map(moved)

    def split(self, parts: int) -> list[Part]:
        """Cut into equal micro-batches: image i goes to number i % parts.

        Raises:
            ValueError: they would not be equal.
        """
        if len(self) % parts:
            raise ValueError(f"{len(self)} images cannot be split into {parts} equal parts")
        return [self._map(itemgetter(slice(i, None, parts))) for i in range(parts)]

    def _map(self, function: Callable[[Any], Any]) -> Part:
        views = {name: function(values) for name, values in self.views.items()}
        targets = None if self.targets is None else function(self.targets)
        return Part(views, targets, function(self.indices))


class Batch(dict[str, Part]):
    """The images of one step, by the name of their stream.

    Example:
        >>> numbers = torch.arange(4)
        >>> batch = Batch(labeled=Part({"image": numbers[:, None]}, numbers, numbers))
        >>> [part["labeled"].targets.tolist() for part in batch.split(2)]
        [[0, 2], [1, 3]]
    """

    def to(self, device: torch.device | str) -> Batch:
        """All parts on the device."""
        return Batch({name: part.to(device) for name, part in self.items()})

    def split(self, parts: int) -> list[Batch]:
        """Cut every stream into equal micro-batches."""
        pieces = {name: part.split(parts) for name, part in self.items()}
        return [Batch({name: piece[i] for name, piece in pieces.items()}) for i in range(parts)]
