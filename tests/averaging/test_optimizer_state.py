import io

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.optimizer_state import OptimizerStates, average_slots


def adam_after(steps, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_mean_of_moments():
    states = [adam_after(3, seed).state_dict()["state"] for seed in (0, 1)]
    mean = average_slots(states, [1.0, 1.0])
    for parameter in (0, 1):
        assert mean[parameter]["step"] == 3
        for slot in ("exp_avg", "exp_avg_sq"):
            one, other = (state[parameter][slot].double() for state in states)
            assert torch.equal(mean[parameter][slot], ((one + other) / 2).float())


def test_counters_that_differ_are_an_error():
    states = [adam_after(steps).state_dict()["state"] for steps in (3, 4)]
    with pytest.raises(ValueError, match=r"slot 0.step is 3.* for member 0 but .*4"):
        average_slots(states, [1.0, 1.0])


def test_missing_slots_are_an_error():
    states = [adam_after(steps).state_dict()["state"] for steps in (3, 0)]
    with pytest.raises(ValueError, match=r"slot 0\.\w+ (exists|is) only"):
        average_slots(states, [1.0, 1.0])


def test_slots_without_a_mean_must_agree():
    with pytest.raises(ValueError, match=r"slot 0\.ramp is 0\.1 for member 0 but 0\.2"):
        average_slots([{0: {"ramp": 0.1}}, {0: {"ramp": 0.2}}], [1.0, 1.0])
    assert average_slots([{0: {"momentum": None}}] * 2, [1.0, 1.0]) == {0: {"momentum": None}}


@pytest.mark.parametrize("policy", ["keep", "average", "reset", "carry"])
def test_param_groups_belong_to_the_member(policy):
    optimizer = adam_after(0)
    states = OptimizerStates(optimizer, policy, 2)
    group = optimizer.param_groups[0]
    states.begin_run()
    states.part()
    states.begin_episode()
    group["lr"] = 0.05
    states.next_member(0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.param_groups[0]["lr"] = 0.05
    states.end_episode(states.averaged([1, 1], spoiled=False, accumulate="float64"))
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("policy", ["keep", "average", "reset", "carry"])
def test_state_loads_with_weights_only(policy):
    optimizer = adam_after(2)
    states = OptimizerStates(optimizer, policy, 3)
    states.begin_run()
    states.part()
    states.begin_episode()
    states.next_member(0)
    buffer = io.BytesIO()
    torch.save(states.state_dict(), buffer)
    buffer.seek(0)
    again = OptimizerStates(optimizer, policy, 3)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert str(again.state_dict()) == str(states.state_dict())
