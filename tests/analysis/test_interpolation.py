import pytest
import torch
from torch import nn

from ssod_imwa.analysis.interpolation import (
    interpolate,
    total_distance,
    weight_distances,
)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model(torch.randn(8, 3))  # statistics of its own
        return model.eval()


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_points_of_the_line_are_the_weighted_means_of_weights_and_statistics():
    first, second = copied(network(0)), copied(network(1))
    seen = []
    interpolate(
        network(2), first, second, [0, 0.3, 1], lambda m: seen.append(copied(m)) or {"x": 0.0}
    )
    assert all(torch.equal(seen[0][name], first[name]) for name in first)
    assert all(torch.equal(seen[2][name], second[name]) for name in first)
    for name in ("0.weight", "1.running_var", "2.bias"):
        expected = 0.7 * first[name].double() + 0.3 * second[name].double()
        torch.testing.assert_close(seen[1][name].double(), expected, rtol=1e-6, atol=1e-7)


def test_batch_norms_are_re_estimated_between_the_ends_only():
    first, second = copied(network(0)), copied(network(1))
    calls = []

    def recompute(model):
        calls.append(model)
        model[1].running_mean.fill_(7.0)

    found = interpolate(
        network(2),
        first,
        second,
        [0, 0.5, 1],
        lambda m: {"mean": float(m[1].running_mean[0])},
        recompute=recompute,
    )
    assert len(calls) == 1
    assert found["mean"].tolist() == [
        float(first["1.running_mean"][0]),
        7.0,
        float(second["1.running_mean"][0]),
    ]


def test_a_share_out_of_range_is_refused():
    state = copied(network(0))
    with pytest.raises(ValueError, match=r"share = 1.5 is not allowed \(must be 0..1\)"):
        interpolate(network(0), state, state, [1.5], lambda m: {"x": 0.0})


def test_distances_are_those_of_a_loop_over_parameters():
    one, other = network(0), network(1)
    names = [name for name, _ in one.named_parameters()]
    found = weight_distances(one.state_dict(), other.state_dict(), names)
    assert list(found) == ["0", "1", "2"]
    total = 0.0
    for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            total += (x - y) ** 2
    assert total_distance(found) == pytest.approx(total**0.5, rel=1e-6)
    flat = [torch.cat([m[2].weight.flatten(), m[2].bias]) for m in (one, other)]
    assert found["2"] == pytest.approx(float((flat[0] - flat[1]).detach().norm()), rel=1e-5)


def test_statistics_of_batch_norms_are_no_distance():
    one, other = copied(network(0)), copied(network(0))
    other["1.running_mean"] += 5
    names = [name for name, _ in network(0).named_parameters()]
    assert total_distance(weight_distances(one, other, names)) == 0


def test_states_of_other_networks_are_refused():
    state = copied(network(0))
    with pytest.raises(ValueError, match="parameter 'x' is not in both states"):
        weight_distances(state, state, ["x"])
    with pytest.raises(ValueError, match=r"2.bias is \(2,\) and \(3,\)"):
        weight_distances(state, {**state, "2.bias": torch.zeros(3)}, ["2.bias"])
