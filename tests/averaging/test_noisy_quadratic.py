"""The exact model in examples/noisy_quadratic.py against its closed form and against training."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/noisy_quadratic.py"


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    sys.modules[EXAMPLE.stem] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[EXAMPLE.stem]


def closed_form(quadratic, rate, steps, members):
    """Bias (1 - eta h)^2T and variance V(eta) / M of a constant rate, as a geometric series."""
    loss = 0.0
    for h, s, x in zip(quadratic.curvatures, quadratic.noise, quadratic.start, strict=True):
        left = (1 - rate * h) ** (2 * steps)
        series = (1 - left) / (1 - (1 - rate * h) ** 2)
        loss += 0.5 * h * (left * x + rate**2 * s * series / members)
    return loss


@pytest.mark.parametrize("steps", [1, 10, 300])
@pytest.mark.parametrize("members", [1, 2, 5])
def test_constant_rates_have_the_closed_form(example, steps, members):
    quadratic, rates = example.problem(), np.array([0.01, 0.3, 1.9])
    losses = example.expected_loss(quadratic, np.ones((steps, 1)) * rates, members)
    expected = [closed_form(quadratic, rate, steps, members) for rate in rates]
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def simulate(quadratic, rates, *, members, episodes, runs, seed):
    """Losses (runs,) of trained means: members walk apart from where each episode begins."""
    random = np.random.default_rng(seed)
    h, width = quadratic.curvatures, np.sqrt(quadratic.noise)
    mean = np.tile(np.sqrt(quadratic.start), (runs, 1))
    for part in np.array_split(rates, episodes):
        ends = []
        for _ in range(members):
            x = mean
            for rate in part:
                x = x - rate * (h * x + width * random.standard_normal(x.shape))
            ends.append(x)
        mean = sum(ends) / members
    return 0.5 * (h * mean**2).sum(1)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize(("members", "episodes"), [(1, 1), (2, 4), (3, 20)])
def test_trained_means_lose_what_is_expected(example, kind, members, episodes):
    quadratic, runs = example.problem(), 1000
    rates = example.RATE * example.course(kind, 40)
    losses = simulate(
        quadratic, rates[:, 0], members=members, episodes=episodes, runs=runs, seed=episodes
    )
    expected = example.expected_loss(quadratic, rates, members)[0]
    error = losses.std(ddof=1) / np.sqrt(runs)
    assert abs(losses.mean() - expected) < 4 * error
    assert error < 0.01 * expected  # else the line above says little


def test_averaging_wins_where_the_specification_says(example):
    """Fact 2 of section 12 of the specification of averaging, with its three values."""
    quadratic = example.problem()
    one, twice, half, imwa, best_twice, best_imwa = example.arms(
        quadratic, "constant", example.LENGTHS["saturated"]
    ).values()
    assert [round(x, 4) for x in (imwa, twice, one)] == [0.0046, 0.0077, 0.0082]
    assert imwa == pytest.approx(half, rel=0.1)
    assert best_imwa == pytest.approx(best_twice, rel=0.1)
    for kind, length in (("cosine", "saturated"), ("constant", "short"), ("cosine", "short")):
        steps = example.LENGTHS[length]
        _, twice, half, imwa, best_twice, best_imwa = example.arms(quadratic, kind, steps).values()
        assert twice < imwa
        assert imwa == pytest.approx(half, rel=0.1)
        assert best_twice < best_imwa < 1.1 * best_twice
    for kind in example.COURSES:
        ratio = example.best_rate_ratio(quadratic, kind, example.LENGTHS["saturated"])
        assert 1.5 < ratio < 2.3


def test_at_the_limit_of_stability_no_rate_helps(example):
    """Without noise the best rate is the limit, and IMWA is a run of half the length."""
    quadratic = example.problem()
    quiet = example.Quadratic(quadratic.curvatures, 0 * quadratic.noise, quadratic.start)
    losses = example.arms(quiet, "constant", 300)
    assert losses["IMWA, its best rate"] > 1.1 * losses["one run, 2 T, its best rate"]


def test_it_prints_the_table_of_its_docstring_and_draws(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "quadratic.png"
    monkeypatch.setattr("sys.argv", [EXAMPLE.name, str(picture)])
    docstring = runpy.run_path(str(EXAMPLE), run_name="__main__")["__doc__"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(f"    {line}" in docstring for line in lines)
    assert picture.stat().st_size > 10_000
