"""A tiny classifier, random batches of views, and the real trainer with IMWA around a method."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import SaveAt, copied, on_two_ranks, same
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.classifiers import make_classifier
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.trainer import HookBase, Trainer

COUNTS = [30, 10, 4]
SIZE, BATCH, UNLABELED = 8, 6, 24


class TinyNet(ImageClassifier):
    """Two groups of one convolution with batch norm, features of width 6, three classes."""

    group_names = ("stem", "layer1")

    def __init__(self, classifier="linear", *, scale=5.0):
        super().__init__()
        self.num_features = 6
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = make_classifier(classifier, 6, len(COUNTS), scale=scale)


def build(make, *, seed=0):
    """What `make` returns, with initial weights that are a function of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batch(*counts, views=("image",), size=BATCH, unlabeled=()):
    """A batch that is a function of the counts; labels of random classes.

    `unlabeled` names views of as many unlabeled images again, out of 24.
    """
    generator = counted_generator("batch", *counts)
    images = generator.normal(size=(len(views), size, 3, SIZE, SIZE))
    labels, indices = generator.integers(len(COUNTS), size=size), generator.integers(100, size=size)
    made = (torch.from_numpy(view).float() for view in images)
    labeled = Part(
        dict(zip(views, made, strict=True)), torch.from_numpy(labels), torch.from_numpy(indices)
    )
    if not unlabeled:
        return Batch(labeled=labeled)
    images = generator.normal(size=(len(unlabeled), size, 3, SIZE, SIZE))
    made = (torch.from_numpy(view).float() for view in images)
    truth = torch.from_numpy(generator.integers(len(COUNTS), size=size))
    indices = torch.from_numpy(generator.permutation(UNLABELED)[:size])
    part = Part(dict(zip(unlabeled, made, strict=True)), truth, indices)
    return Batch(labeled=labeled, unlabeled=part)


def batches(schedule, *, views=("image",), unlabeled=(), first_member=0):
    """The batches of a run: a function of member and own iteration."""

    def stream(start):
        for position in map(schedule.position, range(start, len(schedule))):
            member = first_member + position.member
            yield batch(member, position.t, views=views, unlabeled=unlabeled)

    return stream


def trainer(
    method,
    iterations,
    *,
    episodes=1,
    members=1,
    imwa=True,
    first_member=0,
    hooks=(),
    optimizer=None,
    **options,
):
    """The trainer of a run, as `ssod_imwa.runs.run` builds it; `hooks` are called before IMWA's."""
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=members)
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    result = Trainer(
        method,
        schedule,
        batches(
            schedule,
            views=method.reads["labeled"],
            unlabeled=method.reads.get("unlabeled", ()),
            first_member=first_member,
        ),
        optimizer or torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        seed=1,
        first_member=first_member,
        ranks=method.ranks,
        **options,
    )
    result.register_hooks(hooks)
    if imwa:
        averaging = IMWA(
            schedule,
            method.models(),
            optimizer=result.optimizer,
            member_state={"scaler": result.scaler, "method": method},
            ranks=method.ranks,
        )
        result.register_hooks([IMWAHook(averaging)])
    return result


class Watch(HookBase):
    """Calls a function with the position after every step, before IMWA's hook."""

    def __init__(self, function):
        self.function = function

    def after_step(self):
        self.function(self.trainer.position)


class Members(HookBase):
    """Before IMWA's hook, sees each member's state at the end of its part of an episode.

    Attributes:
        states: (episode, member) -> `states` of the method.
    """

    def __init__(self):
        self.states = {}

    def after_step(self):
        position = self.trainer.position
        if position.ends_member:
            self.states[position.episode, position.member] = states(self.trainer.method)


def states(method):
    """Weights and buffers of all models of a method, and what it owns besides."""
    models = {name: model.state_dict() for name, model in method.models().items()}
    return copied({**models, "own": method.state_dict()})


def check_average(method, members):
    """Assert that every tensor of every model is the mean of the members' of the last episode."""
    last = max(episode for episode, _ in members.states)
    of_members = [state for (e, _), state in members.states.items() if e == last]
    for name, model in method.models().items():
        assert not same(of_members[0][name], of_members[1][name]), name
        for key, value in model.state_dict().items():
            values = torch.stack([state[name][key].double() for state in of_members])
            expected = values.mean(0).to(value.dtype)
            assert torch.equal(value, expected), (name, key)


def without_gradient(module):
    """Names of the parameters that the last backward pass did not reach."""
    return {name for name, p in module.named_parameters() if p.grad is None}


@pytest.fixture
def tiny():
    """The helpers of this file; test files cannot import one another."""
    return SimpleNamespace(
        COUNTS=COUNTS,
        UNLABELED=UNLABELED,
        Net=TinyNet,
        build=build,
        batch=batch,
        trainer=trainer,
        Watch=Watch,
        Members=Members,
        SaveAt=SaveAt,
        copied=copied,
        same=same,
        states=states,
        check_average=check_average,
        without_gradient=without_gradient,
        on_two_ranks=on_two_ranks,
    )


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Bitwise comparisons want one thread."""
