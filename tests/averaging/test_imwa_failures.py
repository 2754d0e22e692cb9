"""Members that diverge under IMWA, and averages that fail."""

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.weights import snapshot


def diverging(spoiled, members=3, episodes=1, **options):
    """Weights member + 1, and NaN for spoiled members of the first episode."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    schedule = EpisodeSchedule(episodes, episodes=episodes, members=members)
    imwa = IMWA(schedule, {"m": model}, optimizer=optimizer, **options)
    for g in range(len(schedule)):
        imwa.before_step(g)
        position = schedule.position(g)
        bad = position.member in spoiled and position.episode == 0
        model.weight.grad = torch.full((1, 1), float("nan") if bad else 1.0)
        optimizer.step()
        nn.init.constant_(model.weight, float("inf") if bad else position.member + 1.0)
        imwa.after_step(g)
    return model, optimizer


@pytest.mark.parametrize("store", ["dict", "stream"])
@pytest.mark.parametrize("spoiled", [[0], [1], [2]])
def test_member_that_diverges_stops_the_run(spoiled, store):
    where = rf"m\.weight is not finite .*member {spoiled[0] + 1}/"
    with pytest.raises(FloatingPointError, match=where):
        diverging(spoiled, store=store)


def test_a_dropped_last_member_has_no_distance():
    model = nn.Linear(1, 1)
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model}, nonfinite="drop")
    for g, value in enumerate([1.0, float("inf")]):
        imwa.before_step(g)
        nn.init.constant_(model.weight, value)
        imwa.after_step(g)
    assert imwa.distances == {}


@pytest.mark.parametrize("store", ["dict", "stream"])
@pytest.mark.parametrize(
    ("spoiled", "expected"), [([0], 2.5), ([1], 2.0), ([2], 1.5), ([0, 2], 2.0)]
)
def test_member_that_diverges_can_be_dropped(spoiled, expected, store, caplog):
    model, _ = diverging(spoiled, store=store, nonfinite="drop")
    assert model.weight.item() == expected
    assert f"member {spoiled[0] + 1}/" in caplog.text


@pytest.mark.parametrize("store", ["dict", "stream"])
def test_weights_of_a_dropped_member_are_shared_out(store):
    model, _ = diverging([0], store=store, nonfinite="drop", coefficients=[0.5, 0.375, 0.125])
    assert model.weight.item() == pytest.approx(0.75 * 2 + 0.25 * 3)


@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
@pytest.mark.parametrize("spoiled", [[0], [1], [0, 2]])
def test_momentum_of_a_dropped_member_is_given_up(spoiled, optimizer_state):
    model, optimizer = diverging(
        spoiled, episodes=2, nonfinite="drop", optimizer_state=optimizer_state
    )
    slots = optimizer.state[model.weight]
    assert set(slots) == (set() if optimizer_state == "reset" else {"momentum_buffer"})
    assert all(tensor.isfinite().all() for tensor in slots.values())
    assert model.weight.item() == 2


def test_no_finite_member_is_always_an_error():
    with pytest.raises(FloatingPointError, match="no member is left"):
        diverging([0, 1, 2], nonfinite="drop")


def test_failing_rule_changes_nothing(loop):
    def rule(states):
        raise OSError("no validation images")

    run = loop.Run()
    schedule = EpisodeSchedule(1, members=2)
    imwa = run.imwa(schedule, coefficients=rule)
    run.train(schedule, imwa, steps=[0])
    imwa.before_step(1)
    run.step(1, 0)
    before = run.weights()
    momentum = snapshot({"b": run.optimizer.state[run.student[0].weight]["momentum_buffer"]})
    with pytest.raises(OSError, match="no validation images"):
        imwa.after_step(1)
    loop.assert_same(run.weights(), before)
    after = run.optimizer.state[run.student[0].weight]["momentum_buffer"]
    assert torch.equal(after, momentum["b"])
