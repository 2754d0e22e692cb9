import io

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.optimizer_state import (
    KeptState,
    OptimizerStates,
    average_slots,
    clone_state,
)


def adam_after(steps, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
    return optimizer


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
    kept.begin_run()
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
    states.begin_episode(first=True)
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
    states.begin_episode(first=True)
    states.next_member(0)
    buffer = io.BytesIO()
    torch.save(states.state_dict(), buffer)
    buffer.seek(0)
    again = OptimizerStates(optimizer, policy, 3)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert str(again.state_dict()) == str(states.state_dict())
