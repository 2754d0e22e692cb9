import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.analysis.landscape import (
    landscape_across,
    landscape_along,
    moved,
    random_direction,
)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)]
        return nn.Sequential(*layers).eval()


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_filter_of_a_direction_is_as_long_as_the_models(model):
    direction = random_direction(model, np.random.default_rng(1))
    for name in ("0.weight", "3.weight"):
        weight, its = model.get_parameter(name), direction[name]
        for own_filter, its_filter in zip(
            weight.detach(), its, strict=True
        ):  # loop: the definition
            assert float(its_filter.square().sum()) == pytest.approx(
                float(own_filter.square().sum()), rel=1e-5
            )
        assert not torch.allclose(its, weight, atol=1e-3)


def test_biases_and_batch_norms_do_not_move(model):
    direction = random_direction(model, np.random.default_rng(1))
    assert direction.keys() == dict(model.named_parameters()).keys()
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not direction[name].any()


def test_a_direction_is_gaussian_before_it_is_normalized():
    layer = nn.Linear(20_000, 1)
    drawn = random_direction(layer, np.random.default_rng(0))["weight"].flatten()
    drawn = drawn / drawn.std()
    # Moments of a standard normal: kurtosis 3, skewness 0.
    assert float((drawn**4).mean()) == pytest.approx(3, abs=0.2)
    assert float((drawn**3).mean()) == pytest.approx(0, abs=0.1)


def test_a_direction_is_a_function_of_the_generator_alone(model):
    torch.manual_seed(0)
    one = random_direction(model, np.random.default_rng(5))
    torch.manual_seed(1)
    other = random_direction(model, np.random.default_rng(5))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_are_moved_by_the_steps_and_restored_bit_for_bit(model):
    before = copied(model)
    first, second = (random_direction(model, np.random.default_rng(i)) for i in (1, 2))
    with moved(model, [first, second]) as move:
        move(9.0, 9.0)
        move(0.5, -2.0)  # from the original weights, not from the last ones
        expected = before["0.weight"] + 0.5 * first["0.weight"] - 2 * second["0.weight"]
        torch.testing.assert_close(model[0].weight.detach(), expected)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_restored_after_an_error(model):
    before = copied(model)
    direction = random_direction(model, np.random.default_rng(1))

    def fail(_):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        landscape_along(model, direction, [0.5], fail)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def quadratic(model):
    """A loss with the minimum (1, 2) and the curvatures 1 and 3."""
    a, b = model.weight[0].tolist()
    return {"loss": (a - 1) ** 2 + 3 * (b - 2) ** 2, "sum": a + b}


@pytest.fixture
def minimum():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    return layer


def test_the_landscape_of_a_quadratic_is_the_quadratic(minimum):
    steps = [-1.0, 0.0, 0.5]
    along = landscape_along(minimum, {"weight": torch.tensor([[1.0, 1.0]])}, steps, quadratic)
    np.testing.assert_allclose(along["loss"], [4.0, 0.0, 1.0])
    np.testing.assert_allclose(along["sum"], [1.0, 3.0, 4.0])
    across = landscape_across(
        minimum,
        {"weight": torch.tensor([[1.0, 0.0]])},
        {"weight": torch.tensor([[0.0, 1.0]])},
        steps,
        quadratic,
    )
    expected = [[a**2 + 3 * b**2 for b in steps] for a in steps]
    np.testing.assert_allclose(across["loss"], expected)
