"""Operations on batches of images that look up in tables what becomes of values and of pixels."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch.nn.functional import pad

Tables = TypeVar("Tables", bound=tuple[Any, ...])  # a named tuple of tensors


class OnDevices(Generic[Tables]):
    """A named tuple of tensors in CPU memory, copied once to each device that asks for it.

    Example:
        >>> from typing import NamedTuple
        >>> class Rows(NamedTuple):
        ...     values: torch.Tensor
        >>> OnDevices(Rows(torch.arange(2))).on(torch.device("cpu"))
        Rows(values=tensor([0, 1]))
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = {torch.device("cpu"): tables}

    def on(self, device: torch.device) -> Tables:
        """The tensors on a device."""
        if device not in self._tables:
            here = self._tables[torch.device("cpu")]
            self._tables[device] = type(here)(*(table.to(device) for table in here))
        return self._tables[device]


def look_up_values(images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Images with the new values of a table each.

    Args:
        images: uint8 (B, C, H, W).
        values: uint8 (B, 256): new for old value.

    Example:
        >>> images = torch.tensor([1, 255], dtype=torch.uint8).view(1, 1, 1, 2)
        >>> look_up_values(images, torch.arange(255, -1, -1, dtype=torch.uint8)[None]).flatten()
        tensor([254,   0], dtype=torch.uint8)
    """
    return values.gather(1, images.flatten(1).long()).view_as(images)


def look_up_pixels(images: torch.Tensor, sources: torch.Tensor, *, fill: int = 0) -> torch.Tensor:
    """Images with their pixels moved as a table each says.

    Args:
        images: uint8 (B, C, H, W).
        sources: int (B, H * W): 1 + the pixel that comes here, 0 for none.
        fill: value where none comes.

    Example:
        >>> images = torch.tensor([5, 6], dtype=torch.uint8).view(1, 1, 1, 2)
        >>> look_up_pixels(images, torch.tensor([[2, 0]]), fill=9).flatten()
        tensor([6, 9], dtype=torch.uint8)
    """
    pixels = pad(images.flatten(2), (1, 0), value=fill)
    places = sources.long()[:, None].expand(-1, images.shape[1], -1)
    return pixels.gather(2, places).view_as(images)
