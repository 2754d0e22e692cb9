"""The outer step, against PyTorch's SGD, closed forms and the plain mean."""

import io
import re

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.outer import TO_THE_MEAN, Outer, OuterStep
from ssod_imwa.averaging.weights import average

DILOCO = Outer(lr=0.7, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    "outer", [Outer(lr=0.5), Outer(lr=1.5), Outer(momentum=0.6), Outer(0.8, 0.5), DILOCO]
)
def test_it_is_sgd_on_the_negative_move(loop, outer, members):
    """In float64: with torch.optim.SGD outside a run whose optimizer is averaged."""
    schedule = EpisodeSchedule(9, episodes=3, members=members)
    together = loop.trained(schedule, dtype=torch.float64, outer=outer)

    runs = [loop.Run(dtype=torch.float64) for _ in range(members)]
    weights = [p.detach().clone().requires_grad_() for p in runs[0].student.parameters()]
    sgd = torch.optim.SGD(
        weights, lr=outer.lr, momentum=outer.momentum, nesterov=outer.nesterov, weight_decay=0
    )
    for episode in range(3):
        for member, run in enumerate(runs):
            for t in range(3 * episode, 3 * episode + 3):
                run.step(member, t)
        mean = average([run.weights() for run in runs])
        names = [f"student.{name}" for name, _ in runs[0].student.named_parameters()]
        for name, weight in zip(names, weights, strict=True):
            weight.grad = weight.detach() - mean[name]
        sgd.step()
        with torch.no_grad():
            for run in runs:
                for prefix, model in run.models.items():
                    for name, x in model.state_dict().items():
                        x.copy_(mean[f"{prefix}.{name}"])
                for parameter, weight in zip(run.student.parameters(), weights, strict=True):
                    parameter.copy_(weight)
    for name, tensor in together.weights().items():
        torch.testing.assert_close(tensor, runs[0].weights()[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_constant_move_has_its_closed_form(nesterov):
    """Each episode moves by 1: v_e = (1 - b^e) / (1 - b), and the weights sum up the steps."""
    lr, beta, episodes = 0.5, 0.75, 6
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    imwa = IMWA(
        EpisodeSchedule(episodes, episodes=episodes),
        {"model": model},
        outer=Outer(lr=lr, momentum=beta, nesterov=nesterov),
    )
    reached = []
    for g in range(episodes):
        imwa.before_step(g)
        with torch.no_grad():
            model.weight += 1
        imwa.after_step(g)
        reached.append(model.weight.item())
    velocity = (1 - beta ** np.arange(1, episodes + 1)) / (1 - beta)
    steps = lr * (beta * velocity + 1 if nesterov else velocity)
    assert reached == pytest.approx(np.cumsum(steps), rel=1e-13)


@pytest.mark.parametrize("members", [1, 2])
def test_rate_1_without_momentum_is_the_plain_mean_and_keeps_nothing(loop, members):
    schedule = EpisodeSchedule(6, episodes=2, members=members)
    stepped = loop.trained(schedule, outer=Outer(lr=1.0, momentum=0.0))
    loop.assert_same(stepped.weights(), loop.trained(schedule).weights())
    assert stepped.imwa(schedule, outer=TO_THE_MEAN).state_dict()["outer"] is None


def test_the_teacher_and_all_buffers_become_the_mean(loop):
    schedule = EpisodeSchedule(3, members=2)
    stepped, mean = loop.trained(schedule, outer=Outer(lr=0.5)), loop.trained(schedule)
    trained = {f"student.{name}" for name, _ in mean.student.named_parameters()}
    start = loop.Run().weights()
    for name, tensor in stepped.weights().items():
        goal = mean.weights()[name]
        expected = (start[name].double() + goal.double()) / 2 if name in trained else goal
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert any(name.endswith("running_mean") for name in set(start) - trained)


def test_the_common_part_is_no_episode_of_it(loop):
    """It would be by far the longest move."""
    schedule = EpisodeSchedule(8, episodes=1, members=2, start=5)
    run = loop.Run()
    imwa = run.imwa(schedule, outer=DILOCO)
    run.train(schedule, imwa, steps=range(5))
    plain = loop.Run()
    plain.train(EpisodeSchedule(5))
    loop.assert_same(run.weights(), plain.weights())
    assert not imwa.replaces(schedule.position(4))
    assert imwa.replaces(schedule.position(len(schedule) - 1))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("store_device", ["same", "cpu"])
def test_every_step_can_be_resumed_from_bitwise(loop, members, store_device):
    schedule = EpisodeSchedule(6, episodes=3, members=members)
    options = {"outer": DILOCO, "store_device": store_device}
    straight = loop.Run()
    imwa = straight.imwa(schedule, **options)
    files = []
    for g in range(len(schedule)):
        straight.train(schedule, imwa, steps=[g])
        owners = (straight.student, straight.teacher, straight.optimizer, straight.scheduler)
        files.append(io.BytesIO())
        torch.save([*(x.state_dict() for x in (*owners, imwa)), straight.queue], files[-1])
    for g, file in enumerate(files[:-1]):
        file.seek(0)
        *states, saved, queue = torch.load(file, weights_only=True)
        run = loop.Run()
        owners = (run.student, run.teacher, run.optimizer, run.scheduler)
        for owner, state in zip(owners, states, strict=True):
            owner.load_state_dict(state)
        run.queue = queue
        resumed = run.imwa(schedule, **options)
        resumed.load_state_dict(saved)
        run.train(schedule, resumed, steps=range(g + 1, len(schedule)))
        loop.assert_same(run.weights(), straight.weights())
    other = loop.Run().imwa(schedule, outer=Outer(lr=0.7))
    with pytest.raises(ValueError, match=r"outer is \[0.7, 0.0, False\] but was"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_it_is_computed_in_a_wider_type(dtype, accumulate):
    """It is the correctly rounded one, or beside it where a narrow type is rounded from float32."""
    model = nn.Linear(300, 500, dtype=dtype)
    step = OuterStep({"m": model}, Outer(lr=0.3, momentum=0.5), accumulate=accumulate)
    live = {f"m.{name}": p.detach() for name, p in model.named_parameters()}
    goals = {name: torch.randn_like(x) for name, x in live.items()}
    step.begin_episode(live)
    eps = torch.finfo(dtype).eps
    bound = 0 if accumulate == "float64" else 2 * eps if dtype == torch.float32 else eps
    for name, tensor in step.moved(goals).items():
        start, goal = live[name].double(), goals[name].double()
        exact = start + 0.3 * (goal - start)
        torch.testing.assert_close(tensor, exact.to(dtype), rtol=bound, atol=bound)


@pytest.mark.parametrize("members", [1, 2])
def test_a_step_that_fails_leaves_the_weights(loop, monkeypatch, members):
    schedule = EpisodeSchedule(2, members=members)
    run = loop.Run()
    imwa = run.imwa(schedule, outer=DILOCO)
    run.train(schedule, imwa, steps=range(len(schedule) - 1))
    imwa.before_step(len(schedule) - 1)
    run.step(members - 1, 1)
    before = run.weights()
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        imwa.after_step(len(schedule) - 1)
    loop.assert_same(run.weights(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "outer lr = 0.0 is not allowed (must be above 0)"),
        ({"lr": float("nan")}, "outer lr = nan is not allowed"),
        ({"momentum": 1.0}, "outer momentum = 1.0 is not allowed (must be at least 0, below 1)"),
        ({"nesterov": True}, "outer nesterov = True is not allowed without momentum"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Outer(**values)
