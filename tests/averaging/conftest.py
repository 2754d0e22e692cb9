"""A student, its teacher and their optimizer in a plain loop, for the tests of IMWA."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.imwa import IMWA


def make_optimizer(parameters, name):
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Run:
    """A student with batch norm, its EMA, an optimizer, an LR schedule and a method's state."""

    def __init__(self, *, optimizer="sgd", norm=True, dtype=torch.float32):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 1)]
        self.student = nn.Sequential(*layers).to(dtype)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = make_optimizer(self.student.parameters(), optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 / (1 + t))
        self.ema = ModelEMA(self.teacher, self.student, 0.9)
        self.queue = torch.zeros(2)
        self.dtype = dtype
        self.rates = {}

    @property
    def models(self):
        return {"student": self.student, "teacher": self.teacher}

    def state_dict(self):
        return {"queue": self.queue}

    def load_state_dict(self, state):
        self.queue = state["queue"]

    def imwa(self, schedule, **options):
        return IMWA(
            schedule,
            self.models,
            optimizer=self.optimizer,
            member_state={"scheduler": self.scheduler, "method": self},
            **options,
        )

    def step(self, member, t):
        """The optimizer step of a member at its own iteration."""
        self.rates[member, t] = self.optimizer.param_groups[0]["lr"]
        generator = torch.Generator().manual_seed(1000 * member + t)
        inputs = torch.randn(8, 3, generator=generator, dtype=self.dtype)
        self.optimizer.zero_grad()
        loss = (self.student(inputs) - inputs[:, :1] * (1 + self.queue[0])).square().mean()
        loss.backward()
        self.optimizer.step()
        self.ema.update(t)
        self.scheduler.step()
        # In place, as queues are written.
        self.queue[t % 2] = 0.1 * loss.detach()

    def train(self, schedule, imwa=None, steps=None):
        for g in steps or range(len(schedule)):
            position = schedule.position(g)
            if imwa is not None:
                imwa.before_step(g)
            self.step(position.member, position.t)
            if imwa is not None:
                imwa.after_step(g)

    def weights(self):
        return {
            f"{name}.{key}": value.clone()
            for name, model in self.models.items()
            for key, value in model.state_dict().items()
        }


def trained(schedule, *, optimizer="sgd", norm=True, dtype=torch.float32, **options):
    run = Run(optimizer=optimizer, norm=norm, dtype=dtype)
    run.train(schedule, run.imwa(schedule, **options))
    return run


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def loop():
    """The helpers of this file; test files cannot import one another."""
    return SimpleNamespace(Run=Run, trained=trained, assert_same=assert_same)
