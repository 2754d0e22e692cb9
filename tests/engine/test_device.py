"""Which device a run computes on, and whether it is made for the type it computes in."""

import pytest
import torch

from ssod_imwa.engine import device
from ssod_imwa.engine.device import convolution_seconds, pick_device, warn_if_slower_than_float32
from ssod_imwa.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta", "mps"])
def test_a_device_that_is_none_of_ours_is_refused(name):
    with pytest.raises(UserError, match="must be auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [pick_device(name).index for name in ("auto", "cuda", "cuda:1")] == [None, None, 1]
    assert current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="'cuda:2': 2 GPUs are found, counted from 0"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("where", "dtype", "seconds", "warned"),
    [
        (CPU, torch.bfloat16, {torch.float32: 0.001, torch.bfloat16: 0.009}, True),
        (CPU, torch.bfloat16, {torch.float32: 0.001, torch.bfloat16: 0.0005}, False),
        (CPU, None, {}, False),
        (torch.device("cuda"), torch.bfloat16, {}, False),
    ],
)
def test_mixed_precision_that_costs_time_is_said_once_with_the_ratio(
    where, dtype, seconds, warned, monkeypatch, caplog
):
    monkeypatch.setattr(device, "convolution_seconds", seconds.__getitem__)
    warn_if_slower_than_float32(where, dtype)
    expected = "9.0 times as long in bfloat16 as in float32 (9.0 ms, 1.0 ms)"
    assert [expected in record.getMessage() for record in caplog.records] == [True] * warned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_timed_in_its_type_without_a_random_number(dtype, monkeypatch):
    types = []
    conv2d = torch.nn.functional.conv2d

    def noting(*args, **kwargs):
        maps = conv2d(*args, **kwargs)
        types.append(maps.dtype)
        return maps

    monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
    before = torch.get_rng_state()
    assert 0 < convolution_seconds(dtype) < 5
    assert types == [dtype] * 4
    assert torch.get_rng_state().equal(before)
