"""How batches and records travel between processes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssod_imwa.data.shared_memory import describe, megabytes
from ssod_imwa.errors import UserError


@dataclass
class Packed:
    """An object with all its tensors in one, so that it crosses to another process as one file.

    Tensors sent one by one take an open file each in the receiver: two views of 64 images exceed
    the usual limit of 1024. The other remedy, torch's "file_system" sharing strategy, is a setting
    of the whole process and leaves files behind when it is killed.
    """

    body: bytes
    buffer: torch.Tensor

    def pin_memory(self) -> Packed:
        """In page-locked memory; the data loader calls it."""
        return Packed(self.body, self.buffer.pin_memory())


# Numbers of every dtype may start at a multiple of this many bytes.
_ALIGNMENT = 16


class _Packer(pickle.Pickler):
    """Leaves (offset, shape, dtype) in place of each tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.size = 0

    def persistent_id(self, obj: object) -> tuple[int, tuple[int, ...], torch.dtype] | None:
        if not isinstance(obj, torch.Tensor):
            return None
        offset = self.size
        self.tensors.append((offset, obj))
        self.size += -(-obj.nbytes // _ALIGNMENT) * _ALIGNMENT
        return offset, tuple(obj.shape), obj.dtype


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.body))
        self.buffer = packed.buffer

    def persistent_load(self, pid: tuple[int, tuple[int, ...], torch.dtype]) -> torch.Tensor:
        return _window(self.buffer, *pid)


def _window(
    buffer: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return buffer[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


def pack(value: object) -> Packed:
    """Collect an object's tensors; `unpack` gives an equal object with contiguous tensors."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    buffer = torch.empty(packer.size, dtype=torch.uint8)
    for offset, tensor in packer.tensors:
        _window(buffer, offset, tuple(tensor.shape), tensor.dtype).copy_(tensor)
    return Packed(file.getvalue(), buffer)


def unpack(packed: Packed) -> Any:
    """The object that was packed; its tensors are windows of the one buffer."""
    return _Unpacker(packed).load()


class SharedRecords(Sequence[Any]):
    """Records that all processes read from one piece of shared memory.

    A list would be copied into every process: 118,000 COCO records are about 100 MB each time.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        rows = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
        flat = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
        try:
            self._ends = ends.share_memory_()
            self._rows = flat.share_memory_()
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{megabytes(flat.nbytes)} of records cannot be shared with processes: {describe()}"
                " (enlarge it, in Docker with --shm-size, or set DATALOADER.NUM_WORKERS 0)"
            ) from error

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"index = {index} is not in 0..{len(self) - 1}")
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._rows[start : int(self._ends[index])].numpy())
