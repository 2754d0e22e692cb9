import logging
from dataclasses import dataclass, replace
from itertools import repeat

import pytest
import torch
from support import SaveAt
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.engine.label_hook import LabelAdvice, LabelHook, label_numbers
from ssod_imwa.engine.label_statistics import LabelStatistics
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.trainer import Trainer

ADVICE = LabelAdvice("box", none="SOME.KEY", many="OTHER.KEY", missing="THIRD.KEY")


@dataclass
class Inputs:
    rows: torch.Tensor

    def to(self, device):
        return self


class SelfTraining(Method):
    """Fits nothing in particular; after burn-in `labels(t)` are those of 2 images."""

    def __init__(self, burn_in, labels):
        super().__init__(nn.Linear(2, 1))
        self.silent_until, self.labels = burn_in, labels
        self.label_statistics = LabelStatistics(3)

    def losses(self, batch, t):
        if t >= self.silent_until:
            labels = torch.tensor(self.labels(t), dtype=torch.int64)
            used = torch.ones(len(labels), dtype=torch.bool)
            empty = 0 if len(labels) else 2
            self.label_statistics.add(
                labels, torch.full((len(labels),), 0.95), used=used, images=2, empty=empty
            )
        return {"loss": self.parallel_student(batch.rows).square().mean()}


def trainer(
    iterations, *, burn_in=3, labels=lambda t: [], prior=(8, 4, 4), period=5, hooks=(), **schedule
):
    method = SelfTraining(burn_in, labels)
    made = Trainer(
        method,
        EpisodeSchedule(iterations, **schedule),
        lambda start: repeat(Inputs(torch.ones(2, 2))),
        torch.optim.SGD(method.student.parameters(), lr=0.01),
        seed=1,
    )
    hook = LabelHook("abc", prior, labeled_images=4, period=period, advice=ADVICE)
    made.register_hooks([hook, *hooks])
    return made


def records(made):
    """Values of `labels/...` by name: (value, global step) each."""
    return {
        name: history.values()
        for name, history in made.storage.histories().items()
        if name.startswith("labels/")
    }


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr("ssod_imwa.engine.label_hook.PATIENCE", 10)


@pytest.fixture
def said(caplog):
    """What the hook has said so far: levels and texts."""
    caplog.set_level(logging.INFO)
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records]


BEGUN = ("INFO", "burn-in ended after 3 iterations: pseudo-labels are learned now")


def test_the_end_of_burn_in_is_announced_once(said):
    trainer(40, labels=lambda t: [0, 1, 2], episodes=2, members=3).train()
    assert said() == [BEGUN]


def test_a_run_without_burn_in_or_labels_announces_nothing(said):
    trainer(8, burn_in=0, labels=lambda t: [1]).train()
    trainer(8, burn_in=100).train()
    assert said() == []


def test_a_method_without_statistics_is_left_alone(said):
    made = trainer(30)
    made.method.label_statistics = None
    made.method.silent_until = 100
    made.train()
    assert (said(), records(made)) == ([], {})


def test_numbers_of_a_period_are_those_of_its_iterations():
    """Labels by t: 2 at t = 3, 4; 4 at t = 5..9. A period has 5 iterations of 2 images."""
    made = trainer(10, labels=lambda t: [0, 1] if t < 5 else [0, 0, 0, 1])
    made.train()
    assert records(made)["labels/per_image"] == [(1.0, 4), (2.0, 9)]
    assert records(made)["labels/share-a"] == [(50.0, 4), (75.0, 9)]
    assert records(made)["labels/share-c"] == [(0.0, 4), (0.0, 9)]
    assert records(made)["labels/scores-0.9"] == [(100.0, 4), (100.0, 9)]
    assert records(made)["labels/empty_images"] == [(0.0, 4), (0.0, 9)]
    assert "labels/precision" not in records(made)  # nobody knows the truth


def test_a_period_ends_with_a_member():
    """Members of 4 iterations in each of two episodes; the second gives twice the labels."""
    made = trainer(8, burn_in=0, period=6, members=2, episodes=2)
    made.method.labels = lambda t: [0] * (1 + made.position.member)
    made.train()
    expected = [(0.5, 3), (1.0, 5), (1.0, 7), (0.5, 11), (1.0, 15)]
    assert records(made)["labels/per_image"] == expected


def test_one_warning_names_causes_when_no_label_comes(said):
    trainer(60).train()
    begun, (level, warning) = said()
    assert (begun, level) == (BEGUN, "WARNING")
    assert "no box of the teacher passed the threshold in 12 own iterations" in warning
    assert warning.endswith("Likely causes: SOME.KEY")


def test_a_label_now_and_then_is_enough(said):
    trainer(60, labels=lambda t: [0, 1, 2] if t % 9 == 0 else []).train()
    assert said() == [BEGUN]


def test_iterations_are_the_members_own(said):
    """Nine silent iterations of each of four members are no ten of any."""
    trainer(12, members=4).train()
    assert said() == [BEGUN]
    trainer(26, burn_in=0, members=2, episodes=13).train()  # ten of a member over five episodes
    assert [level for level, _ in said()] == ["INFO", "WARNING"]


def test_labels_without_end_are_warned_of(said):
    """16 objects on 4 labeled images are 4 an image; 13 are more than three times as many."""
    trainer(30, labels=lambda t: [0, 1, 2] * 8).train()  # 12 an image
    assert said() == [BEGUN]
    trainer(30, labels=lambda t: [0, 1, 2] * 8 + [0, 0]).train()
    (level, warning) = said()[-1]
    assert level == "WARNING"
    assert "the teacher gives 13 labels an image, the labeled images have 4" in warning
    assert "OTHER.KEY" in warning


def test_a_few_images_with_many_labels_are_no_sign(said):
    trainer(30, labels=lambda t: [0, 1, 2] * 8 + [0, 0], period=4).train()  # 8 images a period
    assert said() == [BEGUN]


def test_a_class_without_labels_is_warned_of_once_many_were_due(said):
    """Class c has a quarter of the labeled objects: 20 are due among 80 labels."""
    trainer(42, labels=lambda t: [0, 1], period=1).train()
    assert said() == [BEGUN]  # after 78 labels 19.5 were due
    trainer(43, labels=lambda t: [0, 1], period=1).train()
    level, warning = said()[-1]
    assert level == "WARNING"
    assert "of c the teacher gave no label among 80" in warning
    assert "THIRD.KEY" in warning


@pytest.mark.parametrize("step", [2, 5, 12, 16, 19, 25])
@pytest.mark.parametrize("labels", [lambda t: [], lambda t: [0] * (t % 3)])
def test_a_resumed_run_says_and_records_the_rest_and_nothing_twice(said, caplog, step, labels):
    whole = trainer(40, labels=labels, members=2)
    whole.train()
    said_by_whole = said()
    caplog.clear()
    save = SaveAt(step)
    stopped = trainer(40, labels=labels, members=2, hooks=[save])
    stopped.max_iter = step + 1
    stopped.train()
    resumed = trainer(40, labels=labels, members=2)
    resumed.load_state_dict(save.read())
    resumed.train()
    assert said() == said_by_whole
    for name, values in records(whole).items():
        assert records(resumed)[name] == [item for item in values if item[1] > step]


def test_numbers_know_the_truth_where_there_is_some():
    statistics = LabelStatistics(2)
    statistics.add(
        torch.tensor([0, 0, 1]),
        torch.tensor([0.9, 0.8, 0.3]),
        used=torch.tensor([True, True, False]),
        images=2,
        empty=1,
        judged=torch.tensor([True, True, True]),
        right=torch.tensor([True, False, True]),
        objects=torch.tensor([0, 0, 1, 1]),
    )
    numbers = label_numbers(statistics.take(), ["a", "b"])
    assert numbers["precision"] == 50
    assert numbers["recall"] == 25
    assert numbers["recall-a"] == 50
    assert numbers["recall-b"] == 0
    assert "precision-b" not in numbers  # no label of b was used
    assert numbers["empty_images"] == 50
    assert numbers["scores-0.3"] == pytest.approx(100 / 3)


class Twins:
    """Two processes that count the same."""

    def __init__(self, rank):
        self.rank, self.is_main = rank, rank == 0

    def all_gather(self, value):
        return [value, value]

    def all_true(self, flag):
        return bool(flag)


def test_ranks_count_together_and_one_of_them_keeps_what_a_checkpoint_knows():
    """6 iterations with one label of 2 images each, on two ranks, saved inside a period of 5."""
    hooks = []
    for rank in range(2):
        made = trainer(6, burn_in=0, labels=lambda t: [1])
        made.ranks = replace(made.ranks, batch=Twins(rank))
        made.train()
        assert records(made)["labels/per_image"] == [(0.5, 4), (0.5, 5)]
        statistics = made.method.label_statistics
        statistics.add(torch.tensor([1]), torch.ones(1), used=torch.ones(1) > 0, images=2, empty=0)
        hooks.append(made.hooks[0])
    states = [hook.state_dict() for hook in hooks]
    assert states[0] == states[1]
    assert states[0]["partial"][0] == [4, 0]  # images of both
    again = [hook.state_dict()["partial"][0] for hook in hooks]
    # The twin stands for the other rank, which has handed its count over.
    assert again == [[8, 0], [0, 0]]
