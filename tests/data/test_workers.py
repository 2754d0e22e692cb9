"""Processes that read images where the memory through which they hand them over is small."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ssod_imwa.data import shared_memory, workers
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.data.shared_memory import AMPLE, LEAST, fitting_workers
from ssod_imwa.data.transfer import SharedRecords, pack, unpack
from ssod_imwa.data.workers import LoaderError, deliveries
from ssod_imwa.errors import UserError


class Reader(torch.utils.data.Dataset):
    """Item i is a megabyte of i."""

    def __getitem__(self, item):
        return pack(torch.full((2**20,), item, dtype=torch.uint8))


@pytest.fixture
def small(monkeypatch):
    """A function that makes the shared memory as small as it is told."""
    monkeypatch.setattr(shared_memory, "_said", [])

    def shrink(free):
        monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)

    return shrink


def read(num_workers):
    batches = deliveries(
        Reader(), range(4), num_workers=num_workers, pin_memory=False, preload=[__name__]
    )
    return [int(batch[0]) for batch in batches]


def test_where_a_few_batches_do_not_fit_images_are_read_without_processes(
    small, caplog, monkeypatch
):
    def refuse(modules):
        raise AssertionError("a process was started")

    monkeypatch.setattr(workers, "_context", refuse)
    small(24 * 2**20)
    assert read(12) == read(12) == [0, 1, 2, 3]  # 25 batches of 1 MB
    (line,) = caplog.messages
    assert "read without processes" in line
    assert "/dev/shm" in line
    assert "12 processes need 25.0 MB" in line
    assert "NUM_WORKERS 0" in line
    with pytest.raises(AssertionError, match="a process was started"):
        read(11)


def test_nothing_is_shared_where_not_even_locks_fit(small, caplog):
    small(LEAST - 1)
    assert fitting_workers(3) == 0

    class Files(torch.utils.data.Dataset):
        def shared(self):
            raise AssertionError("records were shared")

    assert TestBatches(Files(), {}, [1], 3, False, skip=False)._num_workers == 0
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("free", [None, AMPLE])
def test_ample_and_unbounded_memory_is_not_measured(small, caplog, free):
    small(free)
    assert not shared_memory.is_scarce()
    assert fitting_workers(3) == 3
    small(0)
    assert fitting_workers(0) == 0  # nobody asked for processes
    assert not caplog.messages


def test_a_process_that_cannot_hand_over_says_what_to_change(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory: No space left on device (28)")

    sharing = workers._Sharing(Reader())
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert unpack(sharing[1])[0] == 1  # not in a process
    monkeypatch.setattr(workers, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    packed = sharing[1]
    assert not packed.buffer.numel()  # the message itself needs no shared memory
    with pytest.raises(
        LoaderError, match=r"batch of 1\.0 MB .*/dev/shm has .* need 5\.0 MB .*RS 0"
    ):
        workers._delivered(packed)
    with pytest.raises(UserError, match=r"records cannot be shared .*/dev/shm has .*RS 0"):
        SharedRecords(["record"])


def test_processes_that_cannot_be_started_are_one_line(monkeypatch, small):
    def refuse(loader):
        raise OSError(28, "No space left on device")

    small(None)
    monkeypatch.setattr(workers.DataLoader, "__iter__", refuse)
    with pytest.raises(LoaderError, match=r"No space left on device; .*/dev/shm.*NUM_WORKERS 0"):
        read(2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")
def test_a_measured_first_item_is_not_read_twice(small, caplog):
    caplog.set_level(logging.WARNING)
    small(AMPLE - 1)
    assert read(2) == [0, 1, 2, 3]
    assert not caplog.messages
