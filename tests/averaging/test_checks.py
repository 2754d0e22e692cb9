from copy import deepcopy

import pytest
import torch
from torch import nn

from ssod_imwa.averaging import checks
from ssod_imwa.averaging.checks import (
    check_same,
    check_separate,
    check_supported,
    checksum,
    fingerprints,
    nonfinite,
)
from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.watched import WatchedWeights
from ssod_imwa.averaging.weights import copy_, named_state


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


def views_of_one_storage():
    base = torch.arange(12.0).reshape(3, 4)
    return base, {
        "transposed": base.t(),
        "flattened": base.view(-1),
        "a row": base[1],
        "another type": base.view(torch.int32),
    }


@pytest.mark.parametrize("which", list(views_of_one_storage()[1]))
def test_tensors_that_overlap_are_refused(which):
    base, views = views_of_one_storage()
    with pytest.raises(ValueError, match="overlap in memory"):
        check_separate({"weight": base, "view": views[which]})


def test_tensors_that_lie_between_each_other_do_not_overlap():
    base = torch.zeros(3, 4)
    check_separate({"even": base[:, ::2], "odd": base[:, 1::2], "other": torch.zeros(2)})
    check_separate({"first": base[:2], "last": base[2:], "none": base[:0]})


def test_an_expanded_tensor_is_refused():
    with pytest.raises(ValueError, match="mask is expanded"):
        check_separate({"mask": torch.zeros(1, 4).expand(3, 4)})


def test_copy_refuses_to_move_elements_twice():
    base, views = views_of_one_storage()
    target = {"weight": base, "view": views["transposed"]}
    source = {name: torch.ones_like(tensor) for name, tensor in target.items()}
    with pytest.raises(ValueError, match="overlap in memory"):
        copy_(target, source)
    assert base.flatten().tolist() == list(range(12))


def test_a_flattened_alias_in_a_model_is_refused_at_the_start():
    model = torch.nn.Linear(3, 3)
    model.register_buffer("flat", model.weight.detach().view(-1))
    student = deepcopy(model)  # which does not share the alias
    for start in (lambda: named_state({"m": model}), lambda: ModelEMA(model, student, 0.9)):
        with pytest.raises(ValueError, match="overlap in memory"):
            start()


def test_a_lazy_batch_norm_is_refused_at_the_start_in_our_words():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyBatchNorm1d())
    with pytest.raises(TypeError, match="uninitialized tensors cannot be averaged"):
        WatchedWeights({"student": model})


def test_a_flat_parameter_of_fsdp_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter._is_flat_param = True
    with pytest.raises(TypeError, match="sharded"):
        check_supported("student.weight", parameter)


def models(seed=0):
    torch.manual_seed(seed)
    return {
        "student": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        "teacher": nn.Linear(3, 4),
    }


def checksum_of(models):
    return checksum(named_state(models))


def test_equal_models_have_equal_checksums():
    assert checksum_of(models()) == checksum_of(models())
    assert 0 <= checksum_of(models()) < 2**64
    assert checksum_of({}) == checksum_of({})


@pytest.mark.parametrize("name", ["student.0.weight", "student.1.running_var", "teacher.bias"])
def test_one_flipped_bit_changes_the_checksum(name):
    changed = models()
    before = checksum_of(changed)
    model, _, key = name.partition(".")
    changed[model].state_dict()[key].view(torch.int32).view(-1)[-1] ^= 1
    assert checksum_of(changed) != before


def test_swapped_elements_layers_and_names_change_the_checksum():
    one = nn.Linear(3, 4)
    two = nn.Linear(3, 4)
    before = checksum_of({"a": one, "b": two})
    assert checksum_of({"a": two, "b": one}) != before
    assert checksum_of({"b": one, "a": two}) != before
    single = checksum_of({"a": one})
    with torch.no_grad():
        one.weight.copy_(one.weight.flip(0))
    assert checksum_of({"a": one}) != single


def test_signs_of_zero_and_kinds_of_nan_are_different_bits():
    def of(value):
        model = nn.Module()
        model.register_buffer("x", torch.tensor([value]))
        return checksum_of({"m": model})

    assert of(0.0) != of(-0.0)
    assert of(float("nan")) == of(float("nan"))
