import pytest
import torch

from ssod_imwa.engine.events import EventStorage


def test_tensors_are_read_only_when_somebody_looks(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or tolist(x))
    storage = EventStorage()
    for storage.iter in range(5):
        storage.put_tensors({"a": torch.tensor(float(storage.iter)), "b": torch.tensor([1.0])})
    assert not reads
    assert storage.history("a").values() == [(float(i), i) for i in range(5)]
    assert storage.latest() == {"a": (4.0, 4), "b": (1.0, 4)}
    assert len(reads) == 1  # one transfer for all steps


def test_stored_tensors_do_not_change_with_the_callers():
    storage = EventStorage()
    value = torch.tensor(1.0)
    storage.put_tensors({"a": value})
    value.fill_(9)
    assert storage.latest()["a"] == (1.0, 0)


def test_numbers_and_tensors_of_mixed_precision_keep_their_order():
    storage = EventStorage()
    storage.put_tensors({"a": torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)})
    storage.put_scalar("a", 2)
    storage.put_tensors({"a": torch.tensor(0.1, dtype=torch.float64)})
    assert [value for value, _ in storage.history("a").values()] == [1.5, 2.0, 0.1]


def test_nobody_reading_does_not_fill_memory():
    storage = EventStorage()
    for storage.iter in range(2500):
        storage.put_tensors({"a": torch.tensor(1.0)})
    assert len(storage._pending) < 1000
    assert len(storage.history("a").values()) == 2500


def test_values_since_a_step_and_the_last_ones():
    storage = EventStorage()
    for storage.iter, value in enumerate([100.0, 1.0, 5.0, 3.0]):
        storage.put_scalar("loss", value)
    storage.put_scalar("lr", 0.1, smoothing_hint=False, cur_iter=1)
    assert storage.since("loss", 2) == [(5.0, 2), (3.0, 3)]
    assert storage.latest() == {"loss": (3.0, 3), "lr": (0.1, 1)}
    assert storage.smoothing_hints() == {"loss": True, "lr": False}


def test_contradicting_hint_and_unknown_name_are_errors():
    storage = EventStorage()
    storage.put_scalar("a", 1)
    with pytest.raises(ValueError, match="smoothing_hint"):
        storage.put_scalar("a", 1, smoothing_hint=False)
    with pytest.raises(KeyError, match="no history of 'b'"):
        storage.history("b")


def test_several_scalars_are_put_as_detectron2s_hooks_do():
    storage = EventStorage()
    storage.iter = 3
    storage.put_scalars(time=0.5, data_time=0.25)
    assert storage.latest() == {"time": (0.5, 3), "data_time": (0.25, 3)}
