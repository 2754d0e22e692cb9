import random

import numpy as np
import pytest
import torch

from ssod_imwa.engine.modes import evaluating, undisturbed


def draw():
    return torch.rand(1).item(), np.random.rand(), random.random()


def modes(models):
    return [module.training for model in models for module in model.modules()]


@pytest.fixture
def models(tiny):
    """A student whose second layer is frozen, and its teacher."""
    models = tiny.method().models()
    models["student"].train()
    models["student"][1].eval()
    return list(models.values())


@pytest.mark.parametrize("context", [evaluating, undisturbed])
def test_every_module_is_put_back_into_its_own_mode_also_on_errors(models, context):
    before = modes(models)

    def fail():
        assert not any(modes(models))
        models[0].train()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), context(*models):
        fail()
    assert modes(models) == before
    assert len(set(before)) == 2


def test_random_generators_are_put_back(models):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with undisturbed(*models):
        draw()
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_evaluating_does_not_touch_random_generators(models):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with evaluating(*models):
        first = torch.rand(1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
