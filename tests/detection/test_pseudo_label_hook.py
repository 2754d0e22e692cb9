import logging
from dataclasses import dataclass
from itertools import repeat

import pytest
import torch
from support import SaveAt
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.detection.pseudo_label_hook import PseudoLabelHook
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.trainer import Trainer


@dataclass
class Inputs:
    rows: torch.Tensor

    def to(self, device):
        return self


class SelfTraining(Method):
    """Fits nothing in particular; after burn-in it records `counts(t)` as its pseudo-labels."""

    def __init__(self, burn_in, counts):
        super().__init__(nn.Linear(2, 1))
        self.burn_in, self.counts = burn_in, counts

    def losses(self, batch, t):
        losses = {"loss": self.parallel_student(batch.rows).square().mean()}
        if t >= self.burn_in:
            losses["pseudo_boxes"] = torch.tensor(float(self.counts(t)))
        return losses


def trainer(iterations, *, burn_in=3, counts=lambda t: 0, hooks=(), **schedule):
    method = SelfTraining(burn_in, counts)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.01)
    made = Trainer(
        method,
        EpisodeSchedule(iterations, **schedule),
        lambda start: repeat(Inputs(torch.ones(2, 2))),
        optimizer,
        seed=1,
    )
    made.register_hooks([PseudoLabelHook(patience=10), *hooks])
    return made


@pytest.fixture
def said(caplog):
    """What the hook has said so far: levels and texts."""
    caplog.set_level(logging.INFO)
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records]


BEGUN = ("INFO", "burn-in ended after 3 iterations: pseudo-labels are learned now")


def test_the_end_of_burn_in_is_announced_once(said):
    trainer(40, counts=lambda t: 2, episodes=2, members=3).train()
    assert said() == [BEGUN]


def test_a_run_without_burn_in_or_pseudo_labels_announces_nothing(said):
    trainer(8, burn_in=0, counts=lambda t: 1).train()
    trainer(8, burn_in=100).train()
    assert said() == []


def test_one_warning_names_causes_and_keys_when_no_pseudo_label_comes(said):
    trainer(60).train()
    begun, (level, warning) = said()
    assert (begun, level) == (BEGUN, "WARNING")
    assert "no box of the teacher passed the threshold in 17 own iterations" in warning
    for cause in ("SSOD.BBOX_THRESHOLD", "SSOD.BURN_IN_ITERS", "labeled images"):
        assert cause in warning


def test_a_pseudo_label_now_and_then_is_enough(said):
    trainer(60, counts=lambda t: t % 9 == 0).train()
    assert said() == [BEGUN]


def test_iterations_are_the_members_own(said):
    """Nine silent iterations of each of four members are no ten of any."""
    trainer(12, members=4).train()
    assert said() == [BEGUN]
    trainer(26, burn_in=0, members=2, episodes=13).train()  # ten of a member over five episodes
    assert [level for level, _ in said()] == ["INFO", "WARNING"]


@pytest.mark.parametrize("step", [5, 12, 16, 19, 25])
def test_a_resumed_run_says_the_rest_and_nothing_twice(said, caplog, step):
    trainer(40).train()
    whole = said()
    caplog.clear()
    save = SaveAt(step)
    stopped = trainer(40, hooks=[save])
    stopped.max_iter = step + 1
    stopped.train()
    resumed = trainer(40)
    resumed.load_state_dict(save.read())
    resumed.train()
    assert said() == whole
