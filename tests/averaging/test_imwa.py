"""IMWA around a plain loop, against loops and closed forms without it."""

import copy
import functools
import itertools
import logging
import math

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.soups import greedy, metric_of
from ssod_imwa.averaging.weights import average

POLICIES = ["keep", "average", "reset", "carry"]


# -------------------------------------------------------------------- equality with other trainings


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("optimizer_state", ["keep", "average", "carry"])
@pytest.mark.parametrize("episodes", [1, 3, 7])
def test_one_member_is_plain_training_bitwise(loop, episodes, optimizer_state, optimizer):
    plain = loop.Run(optimizer=optimizer)
    plain.train(EpisodeSchedule(7))
    schedule = EpisodeSchedule(7, episodes=episodes)
    wrapped = loop.trained(schedule, optimizer=optimizer, optimizer_state=optimizer_state)
    loop.assert_same(wrapped.weights(), plain.weights())
    assert torch.equal(wrapped.queue, plain.queue)


def test_one_member_keeps_no_copy_and_its_gradients(loop):
    run = loop.Run()
    schedule = EpisodeSchedule(2, episodes=2)
    imwa = run.imwa(schedule)
    run.train(schedule, imwa)
    assert imwa.state_dict()["store"]["start"] is None
    assert imwa.state_dict()["store"]["states"] == []
    assert run.student[0].weight.grad is not None


@pytest.mark.parametrize(
    ("episodes", "members", "start", "expected"),
    [
        (1, 1, 0, ""),
        (3, 1, 0, ""),
        (3, 2, 6, ""),
        (1, 2, 0, "2 members, 1 episode of about 6 iterations"),
        (6, 3, 0, "3 members, 6 episodes of about 1 iteration"),
        ([1, 5], 2, 0, "2 members, 2 episodes of 1 to 5 iterations"),
        (2, 2, 2, "after 2 iterations in common, 2 members, 2 episodes of about 2 iterations"),
    ],
)
def test_averaging_is_announced_and_plain_training_is_not(
    caplog, episodes, members, start, expected
):
    caplog.set_level(logging.INFO)
    lengths = episodes if isinstance(episodes, list) else None
    episodes = len(lengths) if lengths else episodes
    schedule = EpisodeSchedule(6, episodes=episodes, members=members, start=start, lengths=lengths)
    IMWA(schedule, {"model": nn.Linear(1, 1)})
    assert caplog.messages == ([f"IMWA: {expected}, optimizer state: keep"] if expected else [])


def test_reset_differs_from_plain_training(loop):
    plain = loop.Run()
    plain.train(EpisodeSchedule(6))
    wrapped = loop.trained(EpisodeSchedule(6, episodes=2), optimizer_state="reset")
    assert not torch.equal(wrapped.student[0].weight, plain.student[0].weight)


@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
@pytest.mark.parametrize("members", [2, 3])
def test_one_episode_is_the_mean_of_separate_runs_bitwise(loop, members, optimizer_state):
    """That is vanilla model weight averaging."""
    schedule = EpisodeSchedule(6, members=members)
    together = loop.trained(schedule, optimizer_state=optimizer_state)
    separate = []
    for member in range(members):
        run = loop.Run()
        for t in range(6):
            run.step(member, t)
        separate.append(run.weights())
    assert not torch.equal(*[state["student.0.weight"] for state in separate[:2]])
    loop.assert_same(together.weights(), average(separate))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_average_after_every_step_is_one_run_on_the_whole_batch(dtype, bound):
    """SGD with momentum, averaged, without batch norm."""
    members, iterations = 3, 12

    def batch(member, t):
        generator = torch.Generator().manual_seed(100 * member + t)
        return torch.randn(4, 3, generator=generator, dtype=dtype)

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def step(model, optimizer, inputs):
        optimizer.zero_grad()
        (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()

    large, optimizer = build()
    for t in range(iterations):
        step(large, optimizer, torch.cat([batch(member, t) for member in range(members)]))

    model, optimizer = build()
    schedule = EpisodeSchedule(iterations, episodes=iterations, members=members)
    imwa = IMWA(schedule, {"m": model}, optimizer=optimizer, optimizer_state="average")
    for g in range(len(schedule)):
        imwa.before_step(g)
        step(model, optimizer, batch(schedule.position(g).member, schedule.position(g).t))
        assert imwa.after_step(g) == ((g + 1) % members == 0)
    for found, expected in zip(model.parameters(), large.parameters(), strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error <= bound


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("optimizer_state", POLICIES)
def test_every_member_sees_the_base_learning_rates(loop, members, optimizer_state):
    """With a scheduler that counts by itself; T = 7 is not divisible by 3."""
    schedule = EpisodeSchedule(7, episodes=3, members=members)
    run = loop.trained(schedule, optimizer_state=optimizer_state)
    expected = {(m, t): 0.05 * (1 / (1 + t)) for m in range(members) for t in range(7)}
    assert run.rates == pytest.approx(expected, rel=1e-15)


def test_quadratic_loss_has_its_closed_form():
    """Loss (w - c)^2 / 2 with another c for each member."""
    lr, iterations, episodes = 0.1, 12, 3
    centers = [1.0, 4.0]
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, -2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    schedule = EpisodeSchedule(iterations, episodes=episodes, members=2)
    imwa = IMWA(schedule, {"m": model}, optimizer=optimizer)
    averages = []
    for g in range(len(schedule)):
        imwa.before_step(g)
        optimizer.zero_grad()
        ((model.weight - centers[schedule.position(g).member]) ** 2 / 2).sum().backward()
        optimizer.step()
        if imwa.after_step(g):
            averages.append(model.weight.item())
    # n steps move w to c + (1 - lr)^n (w - c), and the mean is linear in c.
    factor = (1 - lr) ** (iterations // episodes)
    center = sum(centers) / 2
    expected = [center + factor ** (e + 1) * (-2.0 - center) for e in range(episodes)]
    assert averages == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------ stores and policies


@pytest.mark.parametrize("coefficients", [None, [0.2, 0.5, 0.3], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize(("store", "device"), [("stream", "same"), ("dict", "cpu")])
def test_stores_give_the_same_bits(loop, store, device, accumulate, coefficients):
    schedule = EpisodeSchedule(6, episodes=2, members=3)
    options = {"accumulate": accumulate, "coefficients": coefficients}
    expected = loop.trained(schedule, **options)
    found = loop.trained(schedule, store=store, store_device=device, **options)
    loop.assert_same(found.weights(), expected.weights())


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize(
    ("store", "device"), [("dict", "same"), ("stream", "same"), ("dict", "cpu")]
)
def test_the_last_members_distance_is_told(members, store, device):
    """Members (3 + m, 4 + m): with two the mean is (3.5, 4.5), and both are 0.71 from it."""
    model = nn.Linear(1, 1)
    schedule = EpisodeSchedule(1, members=members)
    imwa = IMWA(schedule, {"model": model}, store=store, store_device=device)
    assert imwa.distances == {}
    for g in range(members):
        imwa.before_step(g)
        nn.init.constant_(model.weight, 3 + g)
        nn.init.constant_(model.bias, 4 + g)
        imwa.after_step(g)
    apart = (members - 1) / 2
    expected = math.hypot(apart, apart) / math.hypot(3 + apart, 4 + apart)
    assert imwa.distances == {"model": pytest.approx(expected)}


def test_host_memory_is_allocated_once(loop):
    run = loop.Run()
    schedule = EpisodeSchedule(6, episodes=3, members=3)
    imwa = run.imwa(schedule, store_device="cpu")
    where = []
    for g in range(len(schedule)):
        run.train(schedule, imwa, steps=[g])
        held = imwa._store._states + imwa._store._free
        where.append({state["student.0.weight"].data_ptr() for state in held})
    assert len(set.union(*where[6:])) == len(where[-1]) == len(where[5])


@pytest.mark.parametrize("optimizer_state", POLICIES)
def test_policies_start_members_with_the_right_momentum(optimizer_state):
    """Gradient 1 for member 0 and 10 for member 1, decay 0.5, one step each, two episodes."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    schedule = EpisodeSchedule(2, episodes=2, members=2)
    imwa = IMWA(schedule, {"m": model}, optimizer=optimizer, optimizer_state=optimizer_state)
    momenta = []
    for g in range(4):
        imwa.before_step(g)
        model.weight.grad = torch.full((1, 1), [1.0, 10.0][schedule.position(g).member])
        optimizer.step()
        momenta.append(optimizer.state[model.weight]["momentum_buffer"].item())
        imwa.after_step(g)
    expected = {
        "keep": [1, 10, 0.5 * 1 + 1, 0.5 * 10 + 10],
        "average": [1, 10, 0.5 * 5.5 + 1, 0.5 * 5.5 + 10],
        "reset": [1, 10, 1, 10],
        "carry": [1, 0.5 * 1 + 10, 0.5 * 10.5 + 1, 0.5 * 6.25 + 10],
    }
    assert momenta == expected[optimizer_state]


@pytest.mark.parametrize("optimizer_state", POLICIES)
def test_members_part_with_the_common_parts_momentum(optimizer_state):
    """As above, after two steps of member 0 with the gradient 100."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.5)
    schedule = EpisodeSchedule(4, episodes=2, members=2, start=2)
    imwa = IMWA(schedule, {"m": model}, optimizer=optimizer, optimizer_state=optimizer_state)
    momenta = []
    for g in range(len(schedule)):
        imwa.before_step(g)
        member = schedule.position(g).member
        model.weight.grad = torch.full((1, 1), 100.0 if g < 2 else [1.0, 10.0][member])
        optimizer.step()
        momenta.append(optimizer.state[model.weight]["momentum_buffer"].item())
        imwa.after_step(g)
    parting = 0.5 * 100 + 100  # 150
    first, second = 0.5 * parting + 1, 0.5 * parting + 10  # 76, 85
    expected = {
        "keep": [first, second, 0.5 * first + 1, 0.5 * second + 10],
        "average": [first, second, 0.5 * 80.5 + 1, 0.5 * 80.5 + 10],
        "reset": [1, 10, 1, 10],
        "carry": [first, 0.5 * first + 10, 0.5 * 48 + 1, 0.5 * 25 + 10],
    }
    assert momenta == [100, parting, *expected[optimizer_state]]


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_members_that_part_late_are_averaged_from_there(loop, start):
    """Against a plain loop: `start` steps, then two members from copies of all there is."""

    def copy_of(run):
        other = loop.Run()
        for name, model in other.models.items():
            model.load_state_dict(run.models[name].state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        other.scheduler.load_state_dict(run.scheduler.state_dict())
        other.queue = run.queue.clone()
        return other

    together = loop.trained(EpisodeSchedule(7, episodes=1, members=2, start=start))
    common = loop.Run()
    for t in range(start):
        common.step(0, t)
    members = [copy_of(common) for _ in range(2)]
    for m, t in itertools.product(range(2), range(start, 7)):
        members[m].step(m, t)
    assert not torch.equal(*[run.student[0].weight for run in members])
    loop.assert_same(together.weights(), average([run.weights() for run in members]))


@pytest.mark.parametrize("optimizer_state", POLICIES)
def test_members_that_never_part_are_plain_training_bitwise(loop, optimizer_state):
    schedule = EpisodeSchedule(7, episodes=3, members=2, start=7)
    wrapped = loop.trained(schedule, optimizer_state=optimizer_state)
    plain = loop.Run()
    plain.train(EpisodeSchedule(7))
    loop.assert_same(wrapped.weights(), plain.weights())


def test_every_member_parts_with_the_common_parts_own_state(loop):
    schedule = EpisodeSchedule(4, episodes=2, members=2, start=2)
    run = loop.Run()
    imwa = run.imwa(schedule)
    seen = []
    for g in range(len(schedule)):
        imwa.before_step(g)
        seen.append(run.queue[0].item())
        run.queue += 1 + 10 * schedule.position(g).member
        imwa.after_step(g)
    assert seen == [0, 1, 2, 2, 3, 13]


def test_methods_own_state_is_per_member(loop):
    schedule = EpisodeSchedule(4, episodes=2, members=2)
    run = loop.Run()
    imwa = run.imwa(schedule)
    run.queue.fill_(7.0)
    seen = []
    for g in range(len(schedule)):
        imwa.before_step(g)
        seen.append(run.queue.clone().tolist())
        run.queue += 1 + 10 * schedule.position(g).member
        imwa.after_step(g)
    first, second = [7.0, 7.0], [8.0, 8.0]
    assert seen == [first, second, first, [18.0] * 2, [9.0] * 2, [10.0] * 2, [29.0] * 2, [40.0] * 2]


@pytest.mark.parametrize("members", [2, 3])
def test_members_start_from_equal_weights_without_gradients(loop, members):
    run = loop.Run()
    schedule = EpisodeSchedule(4, episodes=2, members=members)
    imwa = run.imwa(schedule)
    starts = {}
    where = {name: value.data_ptr() for name, value in run.student.state_dict().items()}
    for g in range(len(schedule)):
        position = schedule.position(g)
        imwa.before_step(g)
        if position.starts_member:
            starts[position.episode, position.member] = run.weights()
            assert all(p.grad is None for p in run.student.parameters())
        run.step(position.member, position.t)
        imwa.after_step(g)
    for episode, member in itertools.product(range(2), range(1, members)):
        loop.assert_same(starts[episode, member], starts[episode, 0])
    assert not torch.equal(starts[1, 0]["student.0.weight"], starts[0, 0]["student.0.weight"])
    # Re-seeding is in place.
    assert {name: value.data_ptr() for name, value in run.student.state_dict().items()} == where


@pytest.mark.parametrize(("store", "held"), [("dict", [1, 2, 2]), ("stream", [1, 2, 1])])
def test_no_more_models_are_held_than_promised(loop, store, held):
    """M = 3: start weights until the last member begins, plus finished members."""
    run = loop.Run()
    schedule = EpisodeSchedule(1, members=3)
    imwa = run.imwa(schedule, store=store)
    counts = []
    for g in range(3):
        imwa.before_step(g)
        state = imwa.state_dict()["store"]
        counts.append(
            (state["start"] is not None) + len(state["states"]) + (state["running"]["count"] > 0)
        )
        run.step(g, 0)
        imwa.after_step(g)
    assert counts == held
    assert imwa.state_dict()["store"]["states"] == []


# ------------------------------------------------------------------------- coefficients and options


@pytest.mark.parametrize("store_device", ["same", "cpu"])
def test_rule_chooses_coefficients(store_device):
    """Greedy, by a metric of the modules themselves: the mean of members 0 and 1 is best."""
    model = nn.Linear(1, 1, bias=False)
    modules = {"m": model}
    metric = metric_of(modules, lambda: -abs(model.weight.item() - 1.4))
    imwa = IMWA(
        EpisodeSchedule(1, members=3),
        modules,
        coefficients=functools.partial(greedy, metric=metric),
        store_device=store_device,
    )
    for g in range(3):
        imwa.before_step(g)
        nn.init.constant_(model.weight, g + 1.0)
        imwa.after_step(g)
    assert model.weight.item() == 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "list"}, "store = 'list' is not allowed"),
        ({"store_device": "disk"}, "store_device = 'disk' is not allowed"),
        ({"optimizer_state": "mean"}, "optimizer_state = 'mean' is not allowed"),
        ({"optimizer_state": "reset"}, "'reset' needs the optimizer"),
        ({"bn": "pool"}, "bn = 'pool' is not allowed"),
        ({"bn": "recompute"}, "give both or neither"),
        ({"recompute_bn": print}, "give both or neither"),
        ({"nonfinite": "skip"}, "nonfinite = 'skip' is not allowed"),
        ({"accumulate": "float16"}, "accumulate = 'float16' is not allowed"),
        ({"coefficients": [1.0]}, "1 coefficients for 2 members"),
        ({"coefficients": lambda states: [], "store": "stream"}, "a rule for coefficients with"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IMWA(EpisodeSchedule(1, members=2), {"m": nn.Linear(1, 1)}, **options)


def test_dropping_with_carried_momentum_is_refused(loop):
    with pytest.raises(ValueError, match="would inherit a momentum that is not finite"):
        loop.Run().imwa(EpisodeSchedule(1, members=2), nonfinite="drop", optimizer_state="carry")


def test_choice_of_optimizer_state_is_logged(loop, caplog):
    with caplog.at_level(logging.INFO):
        loop.Run().imwa(EpisodeSchedule(9, episodes=3, members=2), optimizer_state="average")
    assert "2 members, 3 episodes of about 3 iterations, optimizer state: average" in caplog.text
