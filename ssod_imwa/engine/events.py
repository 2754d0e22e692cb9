"""Scalars of a run, in memory: detectron2's event storage without a device sync per step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fvcore.common.history_buffer import HistoryBuffer

# Values kept per name; writers put the whole history on disk, hooks look at recent values only.
HISTORY_LENGTH = 10_000
# Blocks of device scalars that may wait for a reader (a hook that never logs must not fill memory).
_MAX_PENDING = 1_000


class EventStorage:
    """Keeps named scalars by global step, under detectron2's names.

    Tensors given to `put_tensors` stay on their device until somebody reads: a GPU is synchronized
    once per reading, not once per step.

    Attributes:
        iter: the global step that values put now belong to.

    Example:
        >>> storage = EventStorage()
        >>> storage.iter = 5
        >>> storage.put_scalar("lr", 0.1)
        >>> storage.put_tensors({"loss": torch.tensor(2.0)})
        >>> storage.latest()
        {'lr': (0.1, 5), 'loss': (2.0, 5)}
    """

    def __init__(self) -> None:
        self.iter = 0
        self._histories: dict[str, HistoryBuffer] = {}
        self._smoothing: dict[str, bool] = {}
        self._pending: list[tuple[int, list[str], torch.Tensor | list[float]]] = []

    def put_scalar(
        self, name: str, value: float, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Record a number; `smoothing_hint` False asks writers for the value itself."""
        self._put([name], [float(value)], smoothing_hint, cur_iter)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **scalars: float
    ) -> None:
        """Record several numbers given as keywords; hooks written for detectron2 call it."""
        values = [float(value) for value in scalars.values()]
        self._put(list(scalars), values, smoothing_hint, cur_iter)

    def put_tensors(self, scalars: Mapping[str, torch.Tensor]) -> None:
        """Record one-element tensors without waiting for the device to compute them."""
        by_device: dict[torch.device, list[str]] = {}
        for name, value in scalars.items():
            by_device.setdefault(value.device, []).append(name)
        for names in by_device.values():
            # stack copies, so what the caller does to its tensors later is not seen here.
            block = torch.stack([scalars[name].detach().reshape(()) for name in names])
            self._put(names, block, True, None)

    def _put(
        self,
        names: list[str],
        values: torch.Tensor | list[float],
        smoothing_hint: bool,
        cur_iter: int | None,
    ) -> None:
        for name in names:
            if self._smoothing.setdefault(name, smoothing_hint) != smoothing_hint:
                raise ValueError(f"scalar {name!r} was put with a different smoothing_hint before")
        self._pending.append((self.iter if cur_iter is None else cur_iter, names, values))
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def _settle(self) -> None:
        """Move what is pending to the histories, in the order in which it was put."""
        pending, self._pending = self._pending, []
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for _, _, values in pending:
            if isinstance(values, torch.Tensor):
                by_device.setdefault(values.device, []).append(values)
        # One transfer per device; torch.cat promotes mixed precisions.
        read = {device: iter(torch.cat(parts).tolist()) for device, parts in by_device.items()}
        for iteration, names, values in pending:
            source = read[values.device] if isinstance(values, torch.Tensor) else iter(values)
            for name, value in zip(names, source, strict=False):  # the source goes on
                if name not in self._histories:
                    self._histories[name] = HistoryBuffer(HISTORY_LENGTH)
                self._histories[name].update(value, iteration)

    def histories(self) -> dict[str, HistoryBuffer]:
        """All values, by name."""
        self._settle()
        return self._histories

    def history(self, name: str) -> HistoryBuffer:
        """The values of one name.

        Raises:
            KeyError: nothing was put under this name.
        """
        histories = self.histories()
        if name not in histories:
            raise KeyError(f"no history of {name!r} (known: {sorted(histories)})")
        return histories[name]

    def latest(self) -> dict[str, tuple[float, int]]:
        """The last value of each name and its global step."""
        return {name: history.values()[-1] for name, history in self.histories().items()}

    def since(self, name: str, first_iter: int) -> list[tuple[float, int]]:
        """(value, global step) of a name's last values, from a global step on."""
        values = self.history(name).values()
        first = len(values)
        while first > 0 and values[first - 1][1] >= first_iter:
            first -= 1
        return values[first:]

    def smoothing_hints(self) -> dict[str, bool]:
        """Whether a name's values are to be smoothed by writers."""
        return self._smoothing
