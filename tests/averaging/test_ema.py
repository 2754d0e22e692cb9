"""The EMA against plain loops, and what is easily done wrong."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ema import ModelEMA, constant_decay, warmup_decay


def pair(seed=0):
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    return copy.deepcopy(student).requires_grad_(False), student


def wander(model, generator):
    """A change of all floating state, as a training step makes."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            else:
                tensor += 1


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9996, 1.0])
def test_update_is_the_recursion(decay):
    teacher, student = pair()
    ema = ModelEMA(teacher, student, decay)
    generator = torch.Generator().manual_seed(1)
    expected = {k: v.double().numpy() for k, v in teacher.state_dict().items()}
    for t in range(50):
        wander(student, generator)
        ema.update(t)
        for name, value in student.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value.double().numpy()
            expected[name] = value.numpy() if "num_batches" in name else mixed
    for name, value in teacher.state_dict().items():
        assert np.allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-7), name


def test_decay_is_asked_for_the_members_own_iteration():
    teacher, student = pair()
    asked = []

    def decay(t):
        asked.append(t)
        return 0.5

    ema = ModelEMA(teacher, student, decay)
    ema.update(3)
    ema.update(4)
    assert asked == [3, 4]


def test_warmup_is_the_plain_mean_of_students():
    """With decay 1 - 1/(t+1) the teacher is the mean of all students so far."""
    teacher, student = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    ema = ModelEMA(teacher, student, warmup_decay(0.999))
    values = np.random.default_rng(0).normal(size=100)
    for t, value in enumerate(values):
        nn.init.constant_(student.weight, value)
        ema.update(t)
        assert teacher.weight.item() == pytest.approx(values[: t + 1].mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant_decay(0.9996), [0.9996] * 4),
        (warmup_decay(0.6), [0, 1 / 2, 0.6, 0.6]),
    ],
)
def test_schedules(schedule, expected):
    assert [schedule(t) for t in range(4)] == expected


@pytest.mark.parametrize("make", [constant_decay, warmup_decay])
@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_out_of_range_is_refused(make, decay):
    with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
        make(decay)


def test_decay_out_of_range_later_is_refused():
    teacher, student = pair()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"decay = 2\.0 is not allowed"):
        ModelEMA(teacher, student, lambda t: 2.0).update(0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(1, 1, bias=False)
        self.two = nn.Linear(1, 1, bias=False)
        self.two.weight = self.one.weight


def test_tied_weights_are_moved_once():
    """Moving them once per name would give 0.75."""
    teacher, student = Tied(), Tied()
    nn.init.zeros_(teacher.one.weight)
    nn.init.ones_(student.one.weight)
    ModelEMA(teacher, student, 0.5).update(0)
    assert teacher.one.weight.item() == 0.5
    assert teacher.two.weight is teacher.one.weight


def test_tensor_shared_by_teacher_and_student_is_left_alone():
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    teacher.weight = student.weight
    nn.init.constant_(student.weight, 3.0)
    ModelEMA(teacher, student, 0.5).update(0)
    assert student.weight.item() == 3


def test_integer_buffers_are_copied():
    """In the formula of floats the counter would stay at 1."""
    teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    ema = ModelEMA(teacher, student, 0.999)
    for t in range(100):
        student.num_batches_tracked += 1
        ema.update(t)
    assert teacher.num_batches_tracked.item() == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_teacher_is_refused(dtype):
    """0.999 of a number and 0.001 of another round to the number."""
    student = nn.Linear(1, 1).to(dtype)
    with pytest.raises(TypeError, match=r"teacher weight is torch\..*keep the teacher in float32"):
        ModelEMA(nn.Linear(1, 1).to(dtype), student, 0.999)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_teacher_follows_a_half_precision_student(dtype):
    student = nn.Linear(1, 1, bias=False).to(dtype)
    teacher = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(teacher.weight)
    nn.init.ones_(student.weight)
    ema = ModelEMA(teacher, student, 0.9996)
    for t in range(2000):
        ema.update(t)
    assert teacher.weight.item() == pytest.approx(1 - 0.9996**2000, rel=1e-4)
    ema.copy()
    assert teacher.weight.item() == 1
    assert teacher.weight.dtype == torch.float32


@pytest.mark.parametrize(("buffers", "expected"), [("ema", 1.0), ("copy", 2.0), ("skip", 0.0)])
def test_choice_for_buffers(buffers, expected):
    teacher, student = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    student.running_mean.fill_(2.0)
    student.num_batches_tracked.fill_(7)
    ModelEMA(teacher, student, 0.5, buffers=buffers).update(0)
    assert teacher.running_mean.item() == expected
    assert teacher.num_batches_tracked.item() == (0 if buffers == "skip" else 7)


@pytest.mark.parametrize("buffers", ["ema", "copy", "skip"])
def test_copy_sets_everything(buffers):
    teacher, student = pair()
    wander(student, torch.Generator().manual_seed(3))
    ModelEMA(teacher, student, 0.9, buffers=buffers).copy()
    for name, value in student.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value)
    assert teacher[0].weight.data_ptr() != student[0].weight.data_ptr()


def test_infinite_mask_stays_infinite():
    def masked():
        model = nn.Linear(1, 1)
        model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return model

    teacher, student = masked(), masked()
    ModelEMA(teacher, student, 0.5).update(0)
    assert teacher.mask.tolist() == [0.0, float("-inf")]


def test_replaced_buffer_and_moved_parameter_are_followed():
    teacher, student = pair()
    ema = ModelEMA(teacher, student, 0.5)
    ema.update(0)
    student[1].running_mean = torch.full((6,), 10.0)
    student[0].weight.data = torch.full((6, 4), 4.0)
    nn.init.zeros_(teacher[0].weight)
    teacher[1].running_mean.zero_()
    ema.update(1)
    assert teacher[1].running_mean.tolist() == [5.0] * 6
    assert torch.equal(teacher[0].weight, torch.full((6, 4), 2.0))


def test_frozen_weights_keep_their_bits():
    teacher, student = pair()
    before = teacher[0].weight.clone()
    ema = ModelEMA(teacher, student, 0.9996)
    for t in range(1000):
        ema.update(t)
    assert torch.equal(teacher[0].weight, before)


@pytest.mark.parametrize(
    ("teacher", "student", "error", "message"),
    [
        (nn.Linear(1, 1), nn.Linear(1, 1, bias=False), ValueError, "bias is only in the teacher"),
        (nn.Linear(1, 1), nn.Linear(2, 1), ValueError, r"weight is \(1, 1\) in the teacher but"),
    ],
)
def test_models_that_do_not_match_are_refused(teacher, student, error, message):
    with pytest.raises(error, match=message):
        ModelEMA(teacher, student, 0.9)


def test_unknown_choice_for_buffers_is_refused():
    with pytest.raises(ValueError, match="buffers = 'mean' is not allowed"):
        ModelEMA(*pair(), 0.9, buffers="mean")


def test_mean_of_emas_is_the_ema_of_the_mean():
    """Both are linear; 1000 steps."""
    generator = torch.Generator().manual_seed(0)
    members = 3
    start = torch.randn(50, generator=generator)
    students = [nn.Linear(50, 1, bias=False) for _ in range(members)]
    teachers = [nn.Linear(50, 1, bias=False) for _ in range(members)]
    for model in [*students, *teachers]:
        model.weight.data = start.clone().view(1, 50)
    emas = [ModelEMA(t, s, 0.9996) for t, s in zip(teachers, students, strict=True)]
    expected = start.double()
    for t in range(1000):
        for student, ema in zip(students, emas, strict=True):
            wander(student, generator)
            ema.update(t)
        mean = torch.stack([s.weight.detach().double() for s in students]).mean(0).view(-1)
        expected = 0.9996 * expected + (1 - 0.9996) * mean
    found = torch.stack([t.weight.detach().double() for t in teachers]).mean(0).view(-1)
    assert ((found - expected).abs() <= 1e-6 * expected.abs().max()).all()


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [(nn.DataParallel, "DataParallel"), (lambda model: torch.compile(model), "torch.compile")],
)
def test_a_wrapped_student_is_told_what_to_give_instead(wrap, hint):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"are those of {hint}"):
        ModelEMA(copy.deepcopy(model), wrap(model), 0.9)
