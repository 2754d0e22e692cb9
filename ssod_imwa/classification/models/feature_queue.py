"""The memory of features that contrastive methods compare with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from ssod_imwa.classification.checks import check_at_least_1


class FeatureQueue:
    """The last features (and labels) that were written: a ring of fixed length.

    It begins full of random directions, with labels of -1, which no image has.

    Args:
        size: rows, at least 1.
        dim: width of a row.
        generator: of the random directions.
        device: where the queue lives.

    Attributes:
        features: (size, dim) float32. Read it before the batch's own features are written.
        labels: (size,) int64.
        position: the row that is written next.
        filled: rows that have been written, which are the first ones; the others are random.

    Raises:
        ValueError: `size` or `dim` is below 1.

    Example:
        >>> queue = FeatureQueue(4, 2, generator=np.random.default_rng(0))
        >>> queue.write_(torch.eye(2), torch.tensor([3, 5]))
        >>> queue.labels
        tensor([ 3,  5, -1, -1])
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        generator: np.random.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        check_at_least_1(size=size, dim=dim)
        directions = torch.from_numpy(generator.standard_normal((size, dim), dtype=np.float32))
        self.features = F.normalize(directions, dim=1).to(device)
        self.labels = torch.full((size,), -1, device=device)
        self.position = 0
        self.filled = 0

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def write_(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Put a batch in the place of the oldest rows, going on at the first after the last.

        Args:
            features: (B, dim), B at most `size`; detached and converted to float32.
            labels: (B,); None writes -1.

        Raises:
            ValueError: the batch is longer than the queue, or a shape does not fit.
        """
        batch, size = len(features), len(self)
        if batch > size:
            raise ValueError(f"a batch of {batch} is not allowed (must be at most size = {size})")
        if labels is None:
            labels = self.labels.new_full((batch,), -1)
        if features.shape != (batch, self.features.shape[1]) or labels.shape != (batch,):
            raise ValueError(
                f"features of shape {tuple(features.shape)} and labels of shape "
                f"{tuple(labels.shape)} do not fit (must be (B, {self.features.shape[1]}) and (B,))"
            )
        before = min(batch, size - self.position)  # rows up to the end of the ring
        for ring, rows in ((self.features, features), (self.labels, labels)):
            ring[self.position : self.position + before].copy_(rows[:before])
            ring[: batch - before].copy_(rows[before:])
        self.position = (self.position + batch) % size
        self.filled = min(self.filled + batch, size)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Features, labels, and the two counts, as tensors (live ones: serialize them at once)."""
        return {
            "features": self.features,
            "labels": self.labels,
            "position": torch.tensor(self.position),
            "filled": torch.tensor(self.filled),
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue where `state_dict` was taken, on this queue's device.

        Raises:
            ValueError: the state is of a queue of another size.
        """
        if state["features"].shape != self.features.shape:
            raise ValueError(
                f"a queue of {tuple(state['features'].shape)} does not fit one of "
                f"{tuple(self.features.shape)} (size and dim must be equal)"
            )
        self.features.copy_(state["features"])
        self.labels.copy_(state["labels"])
        self.position, self.filled = int(state["position"]), int(state["filled"])
