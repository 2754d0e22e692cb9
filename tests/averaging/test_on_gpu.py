"""Stores and bits that need a GPU."""

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.weights import RunningAverage, average, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MEGABYTE = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("members", [2, 3, 5, 7])
def test_average_has_the_bits_of_the_cpu(members, dtype):
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(1_500_000, generator=generator).to(dtype)} for _ in range(members)]
    on_gpu = [snapshot(state, device="cuda") for state in states]
    expected = average(states)["w"]
    assert torch.equal(average(on_gpu)["w"].cpu(), expected)
    mean = RunningAverage()
    for state in on_gpu:
        mean.add(state)
    assert torch.equal(mean.result()["w"].cpu(), expected)


def test_ema_step_is_that_of_the_cpu():
    torch.manual_seed(0)
    students = [nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50))]
    teachers = [nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50))]
    students.append(nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50)).cuda())
    teachers.append(nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50)).cuda())
    students[1].load_state_dict(students[0].state_dict())
    teachers[1].load_state_dict(teachers[0].state_dict())
    for teacher, student in zip(teachers, students, strict=True):
        ModelEMA(teacher, student, 0.9).update(0)
    for name, value in teachers[0].state_dict().items():
        assert torch.allclose(teachers[1].state_dict()[name].cpu(), value, rtol=1e-6), name


def train(members, iterations=4, episodes=2, **options):
    """Final weights, and the peak of allocated bytes."""
    torch.manual_seed(0)
    models = [nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(6)]).cuda() for _ in range(2)]
    student, teacher = models
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    ema = ModelEMA(teacher, student, 0.9)
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=members)
    modules = {"student": student, "teacher": teacher.requires_grad_(False)}
    imwa = IMWA(schedule, modules, optimizer=optimizer, **options)
    torch.cuda.reset_peak_memory_stats()
    for g in range(len(schedule)):
        position = schedule.position(g)
        imwa.before_step(g)
        # Activations are several times the models, as in a detector's training.
        generator = torch.Generator().manual_seed(100 * position.member + position.t)
        inputs = torch.randn(16384, 1024, generator=generator).cuda()
        optimizer.zero_grad()
        student(inputs).square().mean().backward()
        optimizer.step()
        ema.update(position.t)
        imwa.after_step(g)
    peak = torch.cuda.max_memory_allocated()
    return {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}, peak


@pytest.mark.parametrize("options", [{"store": "stream"}, {"store_device": "cpu"}])
def test_stores_give_the_same_bits(options):
    expected, _ = train(3)
    found, _ = train(3, **options)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"store": "dict"}, lambda members: members - 1),
        # The running mean and, until the last member begins, the start weights.
        ({"store": "stream", "accumulate": "float32"}, lambda members: min(members - 1, 2)),
        ({"store_device": "cpu"}, lambda members: 0),
    ],
    ids=["dict", "stream", "cpu"],
)
def test_memory_is_near_its_floor(members, options, pairs):
    pair = 2 * 6 * (1024 * 1024 + 1024) * 4
    _, plain = train(1)
    _, found = train(members, **options)
    assert found - plain <= 1.05 * pairs(members) * pair + 32 * MEGABYTE
