import copy

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ema import warmup_decay
from ssod_imwa.engine.teacher import Teacher


def build_student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def move(student):
    """Change every parameter and buffer, as a step of training does."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    student.train()(torch.randn(4, 2))


def double(model):
    return {name: x.double().clone() for name, x in model.state_dict().items()}


def test_it_begins_as_a_copy_in_eval_mode_without_gradients():
    student = build_student()
    teacher = Teacher(student, 0.9)
    assert teacher.model is not student
    assert all(
        torch.equal(x, y) for x, y in zip(*map(parts, (teacher.model, student)), strict=True)
    )
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


def parts(model):
    return model.state_dict().values()


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("decay", [0.75, warmup_decay(0.75)])
def test_it_is_copied_at_the_end_of_the_start_and_follows_from_there(start, decay):
    student = build_student()
    teacher = Teacher(student, decay, start=start)
    expected = double(teacher.model)
    for t in range(6):
        move(student)
        teacher.follow(t)
        a = decay(t) if callable(decay) else decay
        now = double(student)
        if t == start - 1:
            expected = now
        elif t >= start:
            expected = {
                name: now[name] if name.endswith("tracked") else a * old + (1 - a) * now[name]
                for name, old in expected.items()
            }
        for name, value in double(teacher.model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert teacher.ready(t) == (t >= start - 1)


@pytest.mark.parametrize("buffers", ["ema", "copy", "skip"])
def test_buffers_are_averaged_copied_or_left(buffers):
    student = build_student()
    teacher = Teacher(student, 0.5, buffers=buffers)
    before = copy.deepcopy(teacher.model)
    move(student)
    teacher.follow(0)
    old, new, mean = before[1].running_mean, student[1].running_mean, teacher.model[1].running_mean
    expected = {"ema": (old + new) / 2, "copy": new, "skip": old}[buffers]
    torch.testing.assert_close(mean, expected)
    assert teacher.model[1].num_batches_tracked.item() == (0 if buffers == "skip" else 1)
    assert not torch.equal(teacher.model[0].weight, before[0].weight)


def test_left_buffers_move_by_the_teachers_own_passes():
    """A momentum encoder's batch norms in training mode."""
    student = build_student()
    teacher = Teacher(student, 0.5, buffers="skip")
    teacher.model.train()
    alone = copy.deepcopy(teacher.model)
    inputs = torch.randn(4, 2)
    teacher.model(inputs), alone(inputs)
    move(student)
    teacher.follow(0)
    assert torch.equal(teacher.model[1].running_mean, alone[1].running_mean)
    assert teacher.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, r"decay = 1.5 is not allowed \(must be in 0..1\)"),
        ({"decay": 0.9, "start": -1}, r"start = -1 is not allowed \(must be at least 0\)"),
        ({"decay": 0.9, "buffers": "mean"}, "buffers = 'mean' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Teacher(build_student(), **options)
