"""Averages against NumPy, to the bit where they can be, and the collecting of tensors."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.weights import (
    RunningAverage,
    average,
    copy_,
    frozen_parameters,
    named_state,
    snapshot,
)


def trained_like(members, dtype=torch.float32, size=20_000, seed=0):
    """Members of one run: a common start plus small differences, at all magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator) * torch.logspace(-4, 1, size)
    return [
        {"w": (start * (1 + 0.01 * torch.randn(size, generator=generator))).to(dtype)}
        for _ in range(members)
    ]


def running(states, **options):
    mean = RunningAverage(**options)
    for state in states:
        mean.add(state)
    return mean.result()


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


# ------------------------------------------------------------------------------------ collecting


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("view", self.embed.weight.detach())
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def test_every_tensor_occurs_once_whatever_its_names():
    model = Tied()
    assert sorted(named_state({"m": model})) == ["m.cache", "m.embed.weight"]


def test_tensors_shared_by_student_and_teacher_occur_once():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    teacher.weight = student.weight
    names = sorted(named_state({"student": student, "teacher": teacher}))
    assert names == ["student.bias", "student.weight", "teacher.bias"]


def test_named_state_is_live():
    model = nn.Linear(1, 1)
    state = named_state({"m": model})
    state["m.weight"].fill_(5)
    assert model.weight.item() == 5
    assert not state["m.weight"].requires_grad


def test_parameter_is_frozen_only_if_no_module_trains_it():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    student.bias.requires_grad_(False)
    frozen = frozen_parameters({"student": student, "teacher": teacher})
    assert frozen == {"bias"}
    names = named_state({"student": student, "teacher": teacher}, frozen=frozen)
    assert sorted(names) == ["student.weight", "teacher.weight"]


class Sharded(torch.Tensor):
    """What DTensor is to us: a tensor whose memory is elsewhere."""

    @staticmethod
    def __new__(cls, part):
        return torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 2).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        lambda: torch.zeros(2).to(torch.float8_e4m3fn),
        nn.UninitializedBuffer,
        lambda: Sharded(torch.zeros(2)),
    ],
    ids=["sparse", "quantized", "float8", "lazy", "sharded"],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_tensors_that_are_no_plain_array_are_refused(make):
    model = nn.Module()
    model.register_buffer("odd", make())
    with pytest.raises(TypeError, match=r"m\.odd is .* cannot be averaged"):
        named_state({"m": model})


# --------------------------------------------------------------------------------------- copying


def test_snapshots_do_not_follow_the_model():
    """Without clones all three would be the last member, and so would their mean."""
    model = nn.Linear(1, 1, bias=False)
    members = []
    for value in (1.0, 2.0, 6.0):
        nn.init.constant_(model.weight, value)
        members.append(snapshot(named_state({"m": model})))
    assert [member["m.weight"].item() for member in members] == [1, 2, 6]
    assert average(members)["m.weight"].item() == 3


def test_copy_keeps_storage_and_pairs_by_name():
    target = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}
    where = target["a"].data_ptr()
    copy_(target, {"b": torch.tensor([3.0, 4.0]), "a": torch.tensor([1.0, 2.0])})
    assert target["a"].data_ptr() == where
    assert target["a"].tolist() == [1, 2]
    assert target["b"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(3)}, "a is (2,) in target but (3,) in source; they must be equal"),
        ({"b": torch.zeros(2)}, "a is only in target"),
    ],
)
def test_copy_names_the_first_mismatch(other, message):
    target = {"a": torch.zeros(2)}
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the text is compared)
        copy_(target, other)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------- averaging

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64]


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", range(2, 11))
def test_average_of_equal_members_is_bitwise_equal(members, dtype, accumulate):
    state = trained_like(1, dtype, size=4000)[0]
    assert same_bits(average([state] * members, accumulate=accumulate)["w"], state["w"])
    assert same_bits(running([state] * members, accumulate=accumulate)["w"], state["w"])


@pytest.mark.parametrize("members", [2, 3, 5])
def test_weighted_average_of_equal_members_is_bitwise_equal(members):
    state = trained_like(1, size=4000)[0]
    weights = torch.rand(members, generator=torch.Generator().manual_seed(1)).double()
    coefficients = (weights / weights.sum()).tolist()
    assert same_bits(average([state] * members, coefficients=coefficients)["w"], state["w"])


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("members", [2, 3, 4])
def test_order_of_members_does_not_matter(members, dtype):
    states = trained_like(members, dtype, size=4000)
    expected = average(states)["w"]
    for order in itertools.permutations(states):
        assert same_bits(average(order)["w"], expected)
        assert same_bits(running(order)["w"], expected)


@pytest.mark.parametrize("members", [2, 3, 4, 6])
def test_order_of_members_matters_by_two_units_in_float32(members):
    """2 units in the last place of the largest member."""
    states = trained_like(members, size=4000)
    largest = torch.stack([state["w"] for state in states]).abs().amax(0).numpy()
    one = average(states, accumulate="float32")["w"].numpy()
    other = average(states[::-1], accumulate="float32")["w"].numpy()
    assert (np.abs(one - other) <= 2 * np.spacing(largest)).all()


@pytest.mark.parametrize("members", [1, 2, 3, 5, 10])
def test_average_is_the_correctly_rounded_mean(members):
    """NumPy in extended precision is the reference; half an ulp, 2^-28 more at ties."""
    states = trained_like(members)
    stacked = np.stack([state["w"].numpy() for state in states]).astype(np.longdouble)
    expected = stacked.sum(0) / members
    mean = average(states)["w"].numpy()
    error = np.abs(mean.astype(np.longdouble) - expected)
    assert (error <= np.spacing(np.abs(mean)) * (0.5 + 2.0**-28)).all()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float64, 2**-51)]
)
@pytest.mark.parametrize("members", [2, 3, 6])
def test_other_types_are_rounded_once(members, dtype, bound):
    states = trained_like(members, dtype)
    expected = np.mean([state["w"].double().numpy() for state in states], axis=0)
    mean = average(states)["w"]
    largest = np.max(np.abs([state["w"].double().numpy() for state in states]), axis=0)
    # Numbers below float16's normal range have a fixed spacing of 2^-24.
    assert (np.abs(mean.double().numpy() - expected) <= bound * largest + 2.0**-25).all()
    assert mean.dtype == dtype


@pytest.mark.parametrize("coefficients", [[0.2, 0.3, 0.5], [0.9, 0.0, 0.1], [0.0, 0.0, 1.0]])
def test_weighted_average_against_numpy(coefficients):
    states = trained_like(3)
    stacked = np.stack([state["w"].double().numpy() for state in states])
    expected = np.einsum("m,mi->i", np.array(coefficients), stacked)
    mean = average(states, coefficients=coefficients)["w"].numpy()
    assert (np.abs(mean - expected) <= np.spacing(np.abs(stacked).max(0).astype("f4"))).all()


def test_equal_coefficients_are_the_uniform_average():
    states = trained_like(3)
    assert same_bits(average(states, coefficients=[1 / 3] * 3)["w"], average(states)["w"])


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128])
def test_running_average_has_the_bits_of_the_average(dtype, weights, accumulate):
    states = trained_like(3, dtype, size=300_000)
    expected = average(states, coefficients=weights, accumulate=accumulate)["w"]
    mean = RunningAverage(accumulate=accumulate, uniform=weights is None)
    for state, weight in zip(states[:2], weights or [1.0] * 3, strict=False):
        mean.add(state, weight=weight)
    last = 1.0 if weights is None else weights[2]
    assert same_bits(mean.result(last=states[2], weight=last)["w"], expected)
    assert mean.count == 2
    mean.add(states[2], weight=last)
    assert same_bits(mean.result()["w"], expected)


def test_running_average_continues_from_its_state():
    states = trained_like(3)
    mean = RunningAverage()
    mean.add(states[0])
    mean.add(states[1])
    resumed = RunningAverage()
    resumed.load_state_dict(mean.state_dict())
    mean.add(states[2])
    resumed.add(states[2])
    assert same_bits(mean.result()["w"], resumed.result()["w"])
    with pytest.raises(ValueError, match="accumulate is 'float32' but was 'float64'"):
        RunningAverage(accumulate="float32").load_state_dict(mean.state_dict())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_any_memory_layout(layout):
    def make(seed):
        dense = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        return {
            "channels_last": dense.to(memory_format=torch.channels_last),
            "transposed": dense.transpose(0, 3),
            "expanded": dense[:, :1].expand(2, 3, 4, 5),
            "sliced": dense[:, :, ::2],
        }[layout]

    states = [{"w": make(seed)} for seed in range(3)]
    # One member in another layout than the others.
    states[1]["w"] = states[1]["w"].clone(memory_format=torch.contiguous_format)
    expected = np.mean([state["w"].double().numpy() for state in states], axis=0)
    assert np.allclose(average(states)["w"].numpy(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", [0, 1, 1 << 17, (1 << 17) + 1, (1 << 18) + 3])
def test_sizes_around_a_chunk(size):
    states = trained_like(2, size=size)
    small = [{**state, "one": torch.tensor(float(i))} for i, state in enumerate(states)]
    mean = average(small)
    expected = (states[0]["w"].double() + states[1]["w"].double()) / 2
    assert same_bits(mean["w"], expected.float())
    assert mean["one"].item() == 0.5


# ------------------------------------------------------------------------------- special values


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 60000.0), (torch.float32, 3e38), (torch.bfloat16, 3e38)],
)
@pytest.mark.parametrize("members", [2, 3, 8])
def test_large_values_do_not_overflow(dtype, value, members):
    state = {"w": torch.tensor([value, -value], dtype=dtype)}
    assert same_bits(average([state] * members)["w"], state["w"])


def test_signed_zero_and_subnormal_survive():
    state = {"w": torch.tensor([-0.0, 0.0, 1e-45, -3e-42])}
    assert same_bits(average([state] * 3)["w"], state["w"])


def test_only_the_sign_of_zero_is_lost_in_float32():
    state = {"w": torch.tensor([-0.0, 0.0, 1e-45, -3e-42])}
    mean = average([state] * 3, accumulate="float32")["w"]
    assert torch.equal(mean, state["w"])
    assert same_bits(mean[1:], state["w"][1:])


def test_infinity_and_nan_of_one_member_spread():
    one = {"w": torch.tensor([float("inf"), float("nan"), float("-inf"), 1.0])}
    mean = average([one, {"w": torch.tensor([0.0, 0.0, float("-inf"), 2.0])}])["w"]
    assert mean[0] == float("inf")
    assert mean[1].isnan()
    assert mean[2] == float("-inf")
    assert mean[3] == 1.5


def test_member_without_weight_does_not_count_even_if_not_finite():
    states = [{"w": torch.tensor([float("nan")])}, {"w": torch.tensor([2.0])}]
    assert average(states, coefficients=[0, 1])["w"].item() == 2


def test_empty_and_scalar_tensors():
    states = [{"e": torch.empty(0, 4), "s": torch.tensor(float(i))} for i in range(3)]
    mean = average(states)
    assert mean["e"].shape == (0, 4)
    assert mean["s"].item() == 1


def test_complex_mean_is_component_wise():
    states = [{"c": torch.tensor([1 + 2j])}, {"c": torch.tensor([3 - 4j])}]
    assert average(states)["c"].item() == 2 - 1j


# ---------------------------------------------------------------------- tensors without a mean


def test_counters_take_the_largest_and_other_integers_must_agree():
    states = [
        {"bn.num_batches_tracked": torch.tensor(n), "index": torch.arange(3)} for n in (4, 9, 5)
    ]
    for mean in (average(states), running(states)):
        assert mean["bn.num_batches_tracked"].item() == 9
        assert mean["index"].tolist() == [0, 1, 2]
    assert states[0]["bn.num_batches_tracked"].item() == 4


@pytest.mark.parametrize("form", [average, running])
def test_integers_that_differ_are_an_error_with_both_values(form):
    states = [{"w": torch.zeros(1), "ids": torch.tensor([1, n])} for n in (7, 8)]
    with pytest.raises(ValueError, match=r"ids .* differs between members: 7 and 8 \(element 1\)"):
        form(states)


def test_flags_must_agree():
    with pytest.raises(ValueError, match=r"mask .* differs between members: True and False"):
        average([{"mask": torch.tensor([True])}, {"mask": torch.tensor([False])}])


def test_failed_add_leaves_the_running_average_as_it_was():
    mean = RunningAverage()
    mean.add({"w": torch.tensor([1.0]), "id": torch.tensor(1)})
    with pytest.raises(ValueError, match="id has no mean"):
        mean.add({"w": torch.tensor([9.0]), "id": torch.tensor(2)})
    assert mean.count == 1
    assert mean.result()["w"].item() == 1


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("states", "options", "message"),
    [
        ([], {}, "no member to average"),
        ([{"w": torch.zeros(1)}], {"accumulate": "float16"}, "'float16' is not allowed"),
        ([{"w": torch.zeros(1)}] * 2, {"coefficients": [1.0]}, "1 coefficients for 2 members"),
        ([{"w": torch.zeros(1)}] * 2, {"coefficients": [0.5, 0.6]}, "must sum to 1"),
        ([{"w": torch.zeros(1)}] * 2, {"coefficients": [1.5, -0.5]}, "must be finite and >= 0"),
        ([{"w": torch.zeros(1)}, {"v": torch.zeros(1)}], {}, "v is only in member 1"),
        ([{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], {}, "w is .* in member 0 but"),
        ([{"w": torch.zeros(1)}, {"w": torch.zeros(1).half()}], {}, "float16"),
    ],
)
def test_wrong_input_is_refused(states, options, message):
    with pytest.raises(ValueError, match=message):
        average(states, **options)
