import pytest
import torch

from ssod_imwa.averaging import checks
from ssod_imwa.averaging.checks import check_same, fingerprints, nonfinite


def test_nonfinite_names_the_tensors():
    state = {
        "good": torch.ones(3),
        "nan": torch.tensor([1.0, float("nan")]),
        "half": torch.tensor([60000.0, float("-inf")], dtype=torch.float16),
        "large": torch.tensor([-3e38, 65504.0]),
        "complex": torch.tensor([1.0 + 0j, complex(0, float("inf"))]),
        "integers": torch.tensor([1, 2]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(float("inf"), dtype=torch.float64),
    }
    assert nonfinite(state) == ["nan", "half", "complex", "scalar"]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.int64,
        torch.uint8,
    ],
)
def test_fingerprint_sees_one_bit_anywhere(dtype):
    tensor = torch.arange(100).to(dtype)
    before = fingerprints({"w": tensor})
    assert fingerprints({"w": tensor.clone()}) == before
    for index in (0, 57, 99):
        changed = tensor.clone()
        changed.view(torch.uint8)[index * tensor.element_size()] ^= 1
        assert fingerprints({"w": changed}) != before


def test_fingerprint_sees_order_length_and_sign_of_zero():
    state = {
        "ab": torch.tensor([1.0, 2.0]),
        "ba": torch.tensor([2.0, 1.0]),
        "zero": torch.zeros(2),
        "minus": torch.tensor([0.0, -0.0]),
        "longer": torch.zeros(3),
        "flags": torch.tensor([True, False]),
        "other flags": torch.tensor([False, True]),
    }
    values = fingerprints(state)
    assert len(set(values.values())) == len(state)


def test_fingerprint_of_large_and_strided_tensors():
    tensor = torch.arange((1 << 20) + 5)
    before = fingerprints({"w": tensor})["w"]
    tensor[-1] += 1
    assert fingerprints({"w": tensor})["w"] != before
    square = torch.arange(6.0).view(2, 3)
    assert fingerprints({"w": square.t()}) == fingerprints({"w": square.t().contiguous()})


def test_fingerprint_equals_a_loop_in_python_integers(monkeypatch):
    values = torch.tensor([1.5, -2.0, 0.0])
    bits = values.view(torch.int32).tolist()
    weights = [(i * 0x9E3779B97F4A7C1) | 1 for i in range(1, 4)]
    expected = (3 + sum(b * w for b, w in zip(bits, weights, strict=True))) % 2**64
    assert fingerprints({"w": values})["w"] % 2**64 == expected
    monkeypatch.setattr(checks, "_CHUNK", 2)
    assert fingerprints({"w": values})["w"] % 2**64 == expected


def test_mismatch_is_named():
    with pytest.raises(ValueError, match="w is only in right; left and right"):
        check_same({"left": {}, "right": {"w": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"w is \(1,\) torch.float32 cpu in left but"):
        check_same({"left": {"w": torch.zeros(1)}, "right": {"w": torch.zeros(1).double()}})
    check_same(
        {"left": {"w": torch.zeros(1)}, "right": {"w": torch.zeros(1).double()}}, types=False
    )
