import pickle

import numpy as np
import pytest
import torch

from ssod_imwa.data.transfer import Packed, SharedRecords, pack, unpack
from ssod_imwa.detection.data.records import (
    Annotations,
    DetectionBatch,
    ImageRecord,
    Sample,
    Targets,
    View,
)


def batch():
    image = torch.arange(60, dtype=torch.uint8).view(4, 5, 3).permute(2, 0, 1)
    targets = Targets(torch.rand(2, 4), torch.tensor([3, 1]))
    matrix = torch.rand(3, 3, dtype=torch.float64)
    record = ImageRecord("a.png", 7, 5, 4)
    labeled = Sample(record, View(image, matrix, targets), View(image, matrix, targets))
    empty = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    other = Sample(record, View(image, matrix, None), View(image, matrix, empty))
    return DetectionBatch([labeled], [other])


def test_unpacked_batch_equals_the_packed_one():
    before = batch()
    packed = pack(before)
    after = unpack(pickle.loads(pickle.dumps(packed)))
    assert packed.buffer.dtype == torch.uint8
    view, expected = after.labeled[0].strong, before.labeled[0].strong
    assert torch.equal(view.image, expected.image)
    assert torch.equal(view.matrix, expected.matrix)
    assert torch.equal(view.targets.boxes, expected.targets.boxes)
    assert torch.equal(view.targets.labels, expected.targets.labels)
    assert after.unlabeled[0].weak.targets is None
    assert after.unlabeled[0].strong.targets.boxes.shape == (0, 4)
    assert after.labeled[0].record == before.labeled[0].record


def test_unpacked_tensors_are_contiguous_windows_of_one_buffer():
    packed = pack(batch())
    after = unpack(packed)
    storage = packed.buffer.untyped_storage().data_ptr()
    for sample in after.labeled + after.unlabeled:
        for view in (sample.weak, sample.strong):
            assert view.image.is_contiguous()
            assert view.image.untyped_storage().data_ptr() == storage


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
    boxes = Annotations(
        np.ones((1, 4), np.float32), np.array([2]), np.array([False]), np.array([True])
    )
    records = [ImageRecord(f"{i}" * i, i, 4, 3, boxes if i % 2 else None) for i in range(5)]
    shared = SharedRecords(records)
    assert len(shared) == 5
    for i, expected in enumerate(records):
        assert shared[i].file_name == expected.file_name
        assert shared[i].image_id == i
        assert (shared[i].annotations is None) == (expected.annotations is None)
    assert np.array_equal(shared[3].annotations.boxes, boxes.boxes)
    assert [record.image_id for record in shared] == list(range(5))
    with pytest.raises(IndexError, match=r"index = 5 is not in 0..4"):
        shared[5]
