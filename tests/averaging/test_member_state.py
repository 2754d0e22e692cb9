import io
from copy import deepcopy

import pytest
import torch
from support import needs_fork, on_ranks
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.member_state import KeptState, clone_state, mean_of_states
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Ranks


def test_clone_shares_no_tensor():
    state = {"a": [torch.zeros(1), (torch.zeros(1), {"b": torch.zeros(1)})], "n": 1, "s": "x"}
    cloned = clone_state(state)
    cloned["a"][0] += 1
    cloned["a"][1][1]["b"] += 1
    assert state["a"][0].item() == 0
    assert state["a"][1][1]["b"].item() == 0
    assert cloned["n"] == 1
    assert cloned["s"] == "x"


def test_kept_state_is_not_changed_by_training():
    """Both ways: saved tensors are live, and so are loaded ones."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=1.0)

    def step(gradient):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()

    def momentum():
        return optimizer.state_dict()["state"][0]["momentum_buffer"].item()

    kept = KeptState(optimizer, 3)
    kept.part()
    step(1.0)
    kept.switch(0, 1)
    assert optimizer.state_dict()["state"] == {}
    step(10.0)
    kept.switch(1, 2)
    step(100.0)
    kept.switch(2, 0)
    assert momentum() == 1
    step(1.0)
    kept.switch(0, 1)
    assert momentum() == 10
    step(10.0)
    kept.switch(1, 2)
    assert momentum() == 100
    step(100.0)
    kept.switch(2, 0)
    assert momentum() == 2
    step(1.0)
    kept.switch(0, 1)
    assert momentum() == 20


def test_mean_of_nested_states():
    def state(value, count):
        return {"classes": [torch.tensor([value, 3 * value]), {"steps": count}], "seen": count}

    mean = mean_of_states([state(1.0, 4), state(2.0, 4)], [1.0, 1.0])
    assert str(mean) == str(state(1.5, 4))
    assert mean_of_states([{}, {}], [1.0, 1.0]) == {}
    with pytest.raises(ValueError, match=r"state classes/1/steps is 4 for member 0 but 5 for"):
        mean_of_states([state(1.0, 4), state(2.0, 5)], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"state seen is 4 for member 0 but None for member 1"):
        mean_of_states([{"seen": 4}, {}], [1.0, 1.0])


class Statistics:
    """A method's state of one entry of each kind; a step adds the member's number plus one."""

    at_average = {"mean": "averaged", "log": "shared"}  # noqa: RUF012

    def __init__(self):
        self.queue, self.mean, self.log = torch.zeros(1), torch.zeros(1), torch.zeros(1)

    def step(self, member):
        for tensor in (self.queue, self.mean, self.log):
            tensor += member + 1

    def state_dict(self):
        return {"queue": self.queue, "mean": self.mean, "log": self.log}

    def load_state_dict(self, state):
        assert state.keys() == self.state_dict().keys()
        self.__dict__.update(state)

    def values(self):
        return [x.item() for x in self.state_dict().values()]


def serial(statistics, *, steps=None, state=None, members=2, **options):
    """Two episodes of two iterations; the values after every step."""
    schedule = EpisodeSchedule(4, episodes=2, members=members)
    imwa = IMWA(schedule, {"m": nn.Linear(1, 1)}, member_state={"method": statistics}, **options)
    if state is not None:
        imwa.load_state_dict(state)
    values = []
    for g in range(len(schedule)) if steps is None else steps:
        imwa.before_step(g)
        statistics.step(schedule.position(g).member)
        imwa.after_step(g)
        values.append(statistics.values())
    return imwa, values


def test_entries_become_at_an_average_what_their_owner_says():
    """Kept by each member, averaged like weights, or handed on from member to member."""
    _, values = serial(Statistics())
    # Columns: queue, mean, log. Members add 1 and 2 a step.
    assert values == [
        [1, 1, 1],
        [0, 0, 2],  # member 1 begins like member 0, with what is shared
        [2, 2, 4],
        [2, 3, 6],  # member 0's queue; the mean of 2 and 4
        [3, 4, 7],
        [4, 3, 8],  # member 1's queue, and the episode's first mean
        [6, 5, 10],
        [4, 6, 12],  # the mean of 3 + 2 and 3 + 4
    ]


def test_one_member_changes_nothing():
    _, values = serial(Statistics(), members=1)
    assert values == [[t + 1] * 3 for t in range(4)]


@pytest.mark.parametrize("stop", range(1, 8))
def test_all_kinds_resume_anywhere(stop):
    _, straight = serial(Statistics())
    first = Statistics()
    imwa, before = serial(first, steps=range(stop))
    file = io.BytesIO()
    torch.save({"imwa": imwa.state_dict(), "own": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Statistics()
    second.load_state_dict(saved["own"])
    _, after = serial(second, steps=range(stop, 8), state=saved["imwa"])
    assert before + after == straight


def test_a_dropped_member_is_left_out_of_the_mean():
    statistics, model = Statistics(), nn.Linear(1, 1)
    schedule = EpisodeSchedule(1, members=3)
    options = {"member_state": {"method": statistics}, "nonfinite": "drop"}
    imwa = IMWA(schedule, {"m": model}, **options)
    for g in range(3):
        imwa.before_step(g)
        statistics.step(g)
        if g == 1:
            nn.init.constant_(model.weight, float("nan"))
        imwa.after_step(g)
    assert statistics.values() == [1, 2, 6]


def test_members_that_disagree_change_nothing():
    class Counting(Statistics):
        def state_dict(self):
            return {**super().state_dict(), "mean": int(self.mean)}

        def load_state_dict(self, state):
            super().load_state_dict({**state, "mean": torch.tensor([float(state["mean"])])})

    model, statistics = nn.Linear(1, 1), Counting()
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model}, member_state={"method": statistics})
    for g in range(2):
        imwa.before_step(g)
        nn.init.constant_(model.weight, g)
        statistics.step(g)
        if g == 0:
            imwa.after_step(g)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="state mean is 1 for member 0 but 2 for member 1"):
        imwa.after_step(1)
    assert torch.equal(before["weight"], model.weight)


@pytest.mark.parametrize("kind", [IMWA, ParallelIMWA])
def test_unknown_rules_are_refused(kind):
    statistics, model = Statistics(), {"m": nn.Linear(1, 1)}
    statistics.at_average = {"queue": "mean"}
    state = {"method": statistics}
    with pytest.raises(ValueError, match=r"at_average\['queue'\] = 'mean' of Statistics is not"):
        kind(EpisodeSchedule(2), model, ranks=Ranks.alone(), member_state=state)


def test_members_at_once_cannot_hand_anything_on():
    state = {"method": Statistics()}
    with pytest.raises(ValueError, match='method has "shared" state'):
        ParallelIMWA(EpisodeSchedule(1), {"m": nn.Linear(1, 1)}, Ranks.alone(), member_state=state)


@needs_fork
def test_members_at_once_average_the_same_entries(tmp_path):
    def run(rank):
        statistics = Statistics()
        statistics.at_average = {"mean": "averaged"}
        torch.manual_seed(0)
        model, ranks, values = {"m": nn.Linear(1, 1)}, Ranks.of_run(2), []
        schedule = EpisodeSchedule(4, episodes=2, members=2, only=ranks.member)
        imwa = ParallelIMWA(schedule, model, ranks, member_state={"method": statistics})
        for t in range(4):
            imwa.before_step(t)
            statistics.step(ranks.member)
            imwa.after_step(t)
            values.append(statistics.values()[:2])
        return values

    assert on_ranks(2, run, tmp_path) == [
        [[1, 1], [2, 3], [3, 4], [4, 6]],
        [[2, 2], [4, 3], [6, 5], [8, 6]],
    ]
