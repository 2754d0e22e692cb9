"""The mean of a run's latest averages, against NumPy."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.lawa import LatestAverages, averaged_tensors


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def disturb(model):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += torch.rand(tensor.shape) if tensor.is_floating_point() else 3


def mean_by_numpy(states):
    return {
        k: np.mean([state[k].numpy().astype(np.float64) for state in states], 0) for k in states[0]
    }


@pytest.mark.parametrize(("k", "states"), [(1, 3), (2, 5), (3, 3), (4, 2)])
def test_it_is_the_mean_of_the_last_k_or_of_all_so_far(k, states):
    model, latest, seen = net(), LatestAverages(k), []
    for _ in range(states):
        disturb(model)
        latest.add({"student": model})
        seen.append(copy.deepcopy(model.state_dict()))
    expected = mean_by_numpy(seen[-k:])
    (mean,) = latest.mean().values()
    assert mean.keys() == expected.keys() - {"1.num_batches_tracked"}
    for name, tensor in mean.items():
        assert np.array_equal(tensor.numpy(), expected[name].astype(np.float32)), name


def test_equal_states_give_themselves_bitwise():
    model, latest = net(), LatestAverages(7)
    for _ in range(7):
        latest.add({"student": model})
    for name, tensor in latest.mean()["student"].items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_teacher_that_comes_later_has_fewer_states():
    student, teacher, latest = net(), net(1), LatestAverages(3)
    latest.add({"student": student})
    disturb(student)
    latest.add({"student": student, "teacher": teacher})
    mean = latest.mean()
    assert torch.equal(mean["teacher"]["0.weight"], teacher[0].weight)
    assert not torch.equal(mean["student"]["0.weight"], student[0].weight)


def test_frozen_parameters_are_not_copied():
    student = net()
    student[0].requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    names = {n: set(state) for n, state in averaged_tensors({"s": student, "t": teacher}).items()}
    moving = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias"}
    assert names == {"s": moving, "t": moving}


def test_its_state_can_be_restored_with_a_smaller_k():
    model, latest = net(), LatestAverages(3)
    for _ in range(3):
        disturb(model)
        latest.add({"student": model})
    file = io.BytesIO()
    torch.save(latest.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    same, shorter, last = LatestAverages(3), LatestAverages(1), latest.mean()["student"]
    for other in (same, shorter):
        other.load_state_dict(saved)
    assert all(torch.equal(x, last[name]) for name, x in same.mean()["student"].items())
    assert torch.equal(shorter.mean()["student"]["0.weight"], model[0].weight)


def test_no_state_is_not_allowed():
    with pytest.raises(ValueError, match="k = 0 is not allowed"):
        LatestAverages(0)
