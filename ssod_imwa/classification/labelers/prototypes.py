"""Balanced memory of labeled features, and the classes' prototypes in it (DASO, section 4.7)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.checks import check_above_0, check_at_least_1
from ssod_imwa.classification.labelers.base import StateOfTensors


class Prototypes(StateOfTensors):
    """The last features of each class, and their means.

    Args:
        classes: C.
        width: d, of the features.
        size: L, features of a class that are remembered.
        temperature: T of the cosines.
        device: where they live.

    Attributes:
        queue: (C, L, d) float32, zeros where nothing was written.
        written: (C,) int64, features written so far; number i lies at i mod L.

    Raises:
        ValueError: a number is out of range.

    Source: DASO (arXiv 2106.05682), section 3.2.

    Example:
        >>> prototypes = Prototypes(2, 2, size=4, temperature=1.0)
        >>> prototypes.write_(torch.eye(2), torch.tensor([0, 0]))
        >>> prototypes.means()
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """

    tensors: ClassVar[tuple[str, ...]] = ("queue", "written")

    def __init__(
        self,
        classes: int,
        width: int,
        *,
        size: int,
        temperature: float,
        device: torch.device | str = "cpu",
    ) -> None:
        check_at_least_1(classes=classes, width=width, size=size)
        check_above_0(temperature=temperature)
        self.temperature = temperature
        self.queue = torch.zeros(classes, size, width, device=device)
        self.written = torch.zeros(classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def write_(
        self, features: torch.Tensor, labels: torch.Tensor, processes: Group = Group()
    ) -> None:
        """Put features (B, d) of all processes in the place of the oldest of their classes.

        Raises:
            ValueError: there are more features than a class has places.
        """
        features, labels = processes.gather_rows(features), processes.gather_rows(labels)
        classes, size, _ = self.queue.shape
        if len(labels) > size:
            raise ValueError(
                f"size = {size} is not allowed (must be at least the {len(labels)} labeled images "
                "of a batch)"
            )
        of_class = F.one_hot(labels, classes)
        # How many of the class stand before an image in the batch.
        earlier = (of_class.cumsum(0) - of_class).gather(1, labels[:, None])[:, 0]
        places = (self.written[labels] + earlier) % size
        self.queue[labels, places] = features.float()
        self.written += of_class.sum(0)

    def means(self) -> torch.Tensor:
        """Prototypes c (C, d): means of the remembered features, zeros for a class without."""
        filled = self.written.clamp(1, self.queue.shape[1])
        return self.queue.sum(1) / filled[:, None]

    def similarity_logits(self, features: torch.Tensor) -> torch.Tensor:
        """cos(f, c_k) / T of features (n, d), float32 (n, C); 0 for a class without prototype."""
        directions = F.normalize(features.float(), dim=1)
        return directions @ F.normalize(self.means(), dim=1).T / self.temperature
