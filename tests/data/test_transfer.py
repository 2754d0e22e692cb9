import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ssod_imwa.data.transfer import Packed, SharedRecords, pack, unpack


@dataclass
class Thing:
    """What is sent: tensors of several types among other values."""

    name: str
    image: torch.Tensor
    matrix: torch.Tensor
    boxes: torch.Tensor | None


def things():
    image = torch.arange(60, dtype=torch.uint8).view(4, 5, 3).permute(2, 0, 1)
    matrix = torch.rand(3, 3, dtype=torch.float64)
    boxes = (torch.rand(2, 4), None, torch.zeros(0, 4))
    return [Thing(f"{i}.png", image + i, matrix, x) for i, x in enumerate(boxes)]


def test_unpacked_things_equal_the_packed_ones():
    before = things()
    packed = pack(before)
    after = unpack(pickle.loads(pickle.dumps(packed)))
    assert packed.buffer.dtype == torch.uint8
    for thing, expected in zip(after, before, strict=True):
        assert thing.name == expected.name
        assert torch.equal(thing.image, expected.image)
        assert torch.equal(thing.matrix, expected.matrix)
    assert torch.equal(after[0].boxes, before[0].boxes)
    assert after[1].boxes is None
    assert after[2].boxes.shape == (0, 4)


def test_unpacked_tensors_are_contiguous_windows_of_one_buffer():
    packed = pack(things())
    storage = packed.buffer.untyped_storage().data_ptr()
    for thing in unpack(packed):
        assert thing.image.is_contiguous()
        assert thing.image.untyped_storage().data_ptr() == storage


def test_windows_do_not_overlap():
    tensors = [torch.full((n,), n, dtype=dtype) for n in range(6) for dtype in (torch.uint8, float)]
    after = unpack(pack(tensors))
    for tensor in after:
        tensor += 1
    assert all(torch.equal(a, b + 1) for a, b in zip(after, tensors, strict=True))


def test_objects_without_tensors_travel_too():
    assert unpack(pack({"a": [1, "b"]})) == {"a": [1, "b"]}
    assert isinstance(pack(None), Packed)


def test_shared_records_are_the_records():
    records = [(f"{i}" * i, np.arange(i)) for i in range(5)]
    shared = SharedRecords(records)
    assert len(shared) == 5
    for record, expected in zip(shared, records, strict=True):
        assert record[0] == expected[0]
        assert np.array_equal(record[1], expected[1])
    with pytest.raises(IndexError, match=r"index = 5 is not in 0..4"):
        shared[5]
