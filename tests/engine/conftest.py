"""A tiny semi-supervised method with its data and trainer, and runs that write checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import SaveAt, copied, same
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.engine.checkpoint.output import resume_files
from ssod_imwa.engine.checkpoint.writing import CheckpointHook, faults
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.teacher import Teacher
from ssod_imwa.engine.trainer import HookBase, Trainer

FEATURES, CLASSES = 4, 3


@dataclass
class Batch:
    inputs: torch.Tensor
    labels: torch.Tensor

    def to(self, device):
        return Batch(self.inputs.to(device), self.labels.to(device))

    def split(self, parts):
        return [Batch(self.inputs[i::parts], self.labels[i::parts]) for i in range(parts)]


def build_model(*, seed=0, dropout=0.2, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8) if norm else nn.Identity()]
        return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


class TinyMethod(Method):
    """Cross-entropy on the student; the teacher is a plain exponential moving average of it."""

    def __init__(self, student, *, burn_in=0):
        super().__init__(student, Teacher(student, 0.9, start=burn_in))

    def losses(self, batch, t):
        scores = self.parallel_student(batch.inputs)
        loss = nn.functional.cross_entropy(scores.float(), batch.labels)
        right = (scores.argmax(1) == batch.labels).float().mean()
        return {"loss_cls": loss, "accuracy": right}


def build_method(*, burn_in=0, **model_options):
    return TinyMethod(build_model(**model_options), burn_in=burn_in)


def build_batches(schedule, *, seed=7, first_member=0, size=8, rank=0, world_size=1):
    """Batches that are a function of (seed, member, t), cut into one slice per rank."""

    def batches(start):
        for position in map(schedule.position, range(start, len(schedule))):
            member = first_member + position.member
            generator = counted_generator(seed, "data", member, position.t)
            inputs = torch.from_numpy(generator.normal(size=(size, FEATURES))).float()
            labels = torch.from_numpy(generator.integers(CLASSES, size=size))
            yield Batch(inputs[rank::world_size], labels[rank::world_size])

    return batches


def build_trainer(
    iterations=6,
    *,
    episodes=1,
    members=1,
    method=None,
    first_member=0,
    batches=None,
    lr=0.1,
    seed=7,
    ranks=None,
    schedule=None,
    **options,
):
    schedule = schedule or EpisodeSchedule(iterations, episodes=episodes, members=members)
    method = method or build_method()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=lr, momentum=0.9)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return Trainer(
        method,
        schedule,
        batches or build_batches(schedule, seed=seed, first_member=first_member),
        optimizer,
        seed=seed,
        first_member=first_member,
        ranks=ranks or method.ranks,
        **options,
    )


def copied_state(model):
    """A snapshot; a state dict itself holds the live tensors."""
    return copied(model.state_dict())


@pytest.fixture
def tiny():
    """The helpers of this file; test files cannot import one another."""
    return SimpleNamespace(
        Batch=Batch,
        Method=TinyMethod,
        model=build_model,
        method=build_method,
        batches=build_batches,
        trainer=build_trainer,
        copied_state=copied_state,
        same_state=same,
        SaveAt=SaveAt,
    )


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Bitwise comparisons and forked ranks want one thread."""


# -------------------------------------------------------------------------------------- checkpoints

RUN = {"T": 6, "M": 1, "E": 3, "seed": 1, "config": "LOG_PERIOD: 20"}


class Numbers(Method):
    """Fits a line; the teacher trails the student."""

    def __init__(self):
        torch.manual_seed(0)
        student = nn.Linear(2, 1)
        super().__init__(student, Teacher(student, 0.5))
        self.seen = 0

    def losses(self, batch, t):
        self.seen += 1
        noise = torch.rand(())
        return {"loss": (self.student(batch) * noise).square().mean()}

    def state_dict(self):
        return {"seen": np.int64(self.seen)}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Stop(HookBase):
    def __init__(self, at):
        self.at = at

    def after_step(self):
        if self.trainer.iter == self.at:
            self.trainer.stop_requested = True


def build(directory, *, hooks=(), iterations=6, run=RUN, **options):
    def batches(start):
        return (torch.full((3, 2), 1.0 + g) for g in range(start, iterations))

    method = Numbers()
    trainer = Trainer(
        method,
        EpisodeSchedule(iterations, episodes=3),
        batches,
        torch.optim.SGD(method.student.parameters(), lr=0.01, momentum=0.9),
        seed=1,
    )
    trainer.register_hooks([CheckpointHook(directory, run=run, **options), *hooks])
    return trainer


def names(folder):
    left_out = (".json", ".guard")
    return sorted(p.name for p in folder.iterdir() if p.suffix not in left_out)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def line():
    """The helpers of this section."""
    return SimpleNamespace(RUN=RUN, build=build, Stop=Stop, names=names, flip=flip)


@pytest.fixture(autouse=True)
def _no_fault(monkeypatch):
    monkeypatch.setattr(faults, "_reached", {})
    monkeypatch.delenv(faults.VARIABLE, raising=False)


@pytest.fixture
def stopped(tmp_path):
    """A folder of a run that stopped after step 4, with checkpoints of steps 1, 2, 3, 4."""
    build(tmp_path, period=1, keep=3, hooks=[Stop(4)]).train()
    assert list(resume_files(tmp_path)) == [4, 3, 2, 1]
    return tmp_path
