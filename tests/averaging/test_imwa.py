"""IMWA around a plain loop: checks A4, A5, A6, A8, A9, A10, A12 and exact resuming."""

import copy
import functools
import io
import itertools
import logging

import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ema import ModelEMA
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.soups import greedy, metric_of
from ssod_imwa.averaging.weights import average, snapshot

POLICIES = ["keep", "average", "reset", "carry"]


def make_optimizer(parameters, name):
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Run:
    """A student with batch norm, its EMA, an optimizer, an LR schedule and a method's state."""

    def __init__(self, *, optimizer="sgd", norm=True, dtype=torch.float32):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 1)]
        self.student = nn.Sequential(*layers).to(dtype)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = make_optimizer(self.student.parameters(), optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 / (1 + t))
        self.ema = ModelEMA(self.teacher, self.student, 0.9)
        self.queue = torch.zeros(2)
        self.dtype = dtype
        self.rates = {}

    @property
    def models(self):
        return {"student": self.student, "teacher": self.teacher}

    def state_dict(self):
        return {"queue": self.queue}

    def load_state_dict(self, state):
        self.queue = state["queue"]

    def imwa(self, schedule, **options):
        return IMWA(
            schedule,
            self.models,
            optimizer=self.optimizer,
            member_state={"scheduler": self.scheduler, "method": self},
            **options,
        )

    def step(self, member, t):
        """The optimizer step of a member at its own iteration."""
        self.rates[member, t] = self.optimizer.param_groups[0]["lr"]
        generator = torch.Generator().manual_seed(1000 * member + t)
        inputs = torch.randn(8, 3, generator=generator, dtype=self.dtype)
        self.optimizer.zero_grad()
        loss = (self.student(inputs) - inputs[:, :1] * (1 + self.queue[0])).square().mean()
        loss.backward()
        self.optimizer.step()
        self.ema.update(t)
        self.scheduler.step()
        # In place, as queues are written.
        self.queue[t % 2] = 0.1 * loss.detach()

    def train(self, schedule, imwa=None, steps=None):
        for g in steps or range(len(schedule)):
            position = schedule.position(g)
            if imwa is not None:
                imwa.before_step(g)
            self.step(position.member, position.t)
            if imwa is not None:
                imwa.after_step(g)

    def weights(self):
        return {
            f"{name}.{key}": value.clone()
            for name, model in self.models.items()
            for key, value in model.state_dict().items()
        }


def trained(schedule, *, optimizer="sgd", norm=True, dtype=torch.float32, **options):
    run = Run(optimizer=optimizer, norm=norm, dtype=dtype)
    run.train(schedule, run.imwa(schedule, **options))
    return run


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# -------------------------------------------------------------------- equality with other trainings


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("optimizer_state", ["keep", "average", "carry"])
@pytest.mark.parametrize("episodes", [1, 3, 7])
def test_one_member_is_plain_training_bitwise(episodes, optimizer_state, optimizer):
    """Check A4."""
    plain = Run(optimizer=optimizer)
    plain.train(EpisodeSchedule(7))
    schedule = EpisodeSchedule(7, episodes=episodes)
    wrapped = trained(schedule, optimizer=optimizer, optimizer_state=optimizer_state)
    assert_same(wrapped.weights(), plain.weights())
    assert torch.equal(wrapped.queue, plain.queue)


def test_one_member_keeps_no_copy_and_its_gradients():
    run = Run()
    schedule = EpisodeSchedule(2, episodes=2)
    imwa = run.imwa(schedule)
    run.train(schedule, imwa)
    assert imwa.state_dict()["store"]["start"] is None
    assert imwa.state_dict()["store"]["states"] == []
    assert run.student[0].weight.grad is not None


def test_reset_differs_from_plain_training():
    plain = Run()
    plain.train(EpisodeSchedule(6))
    wrapped = trained(EpisodeSchedule(6, episodes=2), optimizer_state="reset")
    assert not torch.equal(wrapped.student[0].weight, plain.student[0].weight)


@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
@pytest.mark.parametrize("members", [2, 3])
def test_one_episode_is_the_mean_of_separate_runs_bitwise(members, optimizer_state):
    """Check A5: vanilla model weight averaging."""
    schedule = EpisodeSchedule(6, members=members)
    together = trained(schedule, optimizer_state=optimizer_state)
    separate = []
    for member in range(members):
        run = Run()
        for t in range(6):
            run.step(member, t)
        separate.append(run.weights())
    assert not torch.equal(*[state["student.0.weight"] for state in separate[:2]])
    assert_same(together.weights(), average(separate))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_average_after_every_step_is_one_run_on_the_whole_batch(dtype, bound):
    """Check A6: SGD with momentum, averaged, without batch norm."""
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
def test_every_member_sees_the_base_learning_rates(members, optimizer_state):
    """Check A9, with a scheduler that counts by itself; T = 7 is not divisible by 3."""
    schedule = EpisodeSchedule(7, episodes=3, members=members)
    run = trained(schedule, optimizer_state=optimizer_state)
    expected = {(m, t): 0.05 * (1 / (1 + t)) for m in range(members) for t in range(7)}
    assert run.rates == pytest.approx(expected, rel=1e-15)


def test_quadratic_loss_has_its_closed_form():
    """Check A12: loss (w - c)^2 / 2 with another c for each member."""
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


# ---------------------------------------------------------------------------- stores and policies


@pytest.mark.parametrize("coefficients", [None, [0.2, 0.5, 0.3], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0]])
@pytest.mark.parametrize("accumulate", ["float64", "float32"])
@pytest.mark.parametrize(("store", "device"), [("stream", "same"), ("dict", "cpu")])
def test_stores_give_the_same_bits(store, device, accumulate, coefficients):
    """Check A8."""
    schedule = EpisodeSchedule(6, episodes=2, members=3)
    options = {"accumulate": accumulate, "coefficients": coefficients}
    expected = trained(schedule, **options)
    found = trained(schedule, store=store, store_device=device, **options)
    assert_same(found.weights(), expected.weights())


def test_host_memory_is_allocated_once():
    run = Run()
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


def test_methods_own_state_is_per_member():
    schedule = EpisodeSchedule(4, episodes=2, members=2)
    run = Run()
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
def test_members_start_from_equal_weights_without_gradients(members):
    run = Run()
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
        assert_same(starts[episode, member], starts[episode, 0])
    assert not torch.equal(starts[1, 0]["student.0.weight"], starts[0, 0]["student.0.weight"])
    # Re-seeding is in place.
    assert {name: value.data_ptr() for name, value in run.student.state_dict().items()} == where


@pytest.mark.parametrize(("store", "held"), [("dict", [1, 2, 2]), ("stream", [1, 2, 1])])
def test_no_more_models_are_held_than_promised(store, held):
    """Section 5, M = 3: start weights until the last member begins, plus finished members."""
    run = Run()
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


# ---------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("store", ["dict", "stream"])
@pytest.mark.parametrize("optimizer_state", POLICIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_step_can_be_resumed_from_bitwise(optimizer, optimizer_state, store):
    schedule = EpisodeSchedule(4, episodes=2, members=3)
    options = {"optimizer_state": optimizer_state, "store": store, "bn": "keep"}
    straight = Run(optimizer=optimizer)
    imwa = straight.imwa(schedule, **options)
    files = []
    for g in range(len(schedule)):
        straight.train(schedule, imwa, steps=[g])
        file = io.BytesIO()
        torch.save(
            {
                "models": straight.weights(),
                "optimizer": straight.optimizer.state_dict(),
                "scheduler": straight.scheduler.state_dict(),
                "queue": straight.queue,
                "imwa": imwa.state_dict(),
            },
            file,
        )
        files.append(file)
    for g, file in enumerate(files[:-1]):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        run = Run(optimizer=optimizer)
        for name, model in run.models.items():
            states = {k.removeprefix(f"{name}."): v for k, v in saved["models"].items()}
            model.load_state_dict({k: v for k, v in states.items() if k in model.state_dict()})
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])
        run.queue = saved["queue"]
        resumed = run.imwa(schedule, **options)
        resumed.load_state_dict(saved["imwa"])
        run.train(schedule, resumed, steps=range(g + 1, len(schedule)))
        assert_same(run.weights(), straight.weights())
        assert torch.equal(run.queue, straight.queue)


def test_state_keys_are_pinned():
    run = Run()
    schedule = EpisodeSchedule(2, members=2)
    state = run.imwa(schedule).state_dict()
    assert sorted(state) == [
        "batchnorm",
        "member_state",
        "optimizer",
        "settings",
        "spoiled",
        "store",
        "weights",
    ]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (EpisodeSchedule(4, episodes=4, members=2), {}, "episodes is 4 but was 2"),
        (EpisodeSchedule(4, episodes=2, members=3), {}, "members is 3 but was 2"),
        (EpisodeSchedule(4, episodes=2, members=2), {"store": "stream"}, "store is 'stream' but"),
        (
            EpisodeSchedule(4, episodes=2, members=2),
            {"optimizer_state": "reset"},
            "optimizer_state is 'reset' but was 'keep'",
        ),
    ],
)
def test_state_of_another_run_is_refused(schedule, options, message):
    run = Run()
    state = run.imwa(EpisodeSchedule(4, episodes=2, members=2)).state_dict()
    with pytest.raises(ValueError, match=message):
        run.imwa(schedule, **options).load_state_dict(state)


def test_steps_that_were_missed_are_noticed():
    run = Run()
    schedule = EpisodeSchedule(2, members=2)
    with pytest.raises(RuntimeError, match="0 members of its episode were seen"):
        run.imwa(schedule).after_step(3)
    with pytest.raises(RuntimeError, match="call before_step and after_step at every step"):
        run.imwa(schedule).after_step(1)


# ------------------------------------------------------------------- shared, frozen and odd tensors


def test_layer_shared_by_student_and_teacher_is_averaged_once():
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    teacher = nn.Sequential(student[0], copy.deepcopy(student[1]))
    schedule = EpisodeSchedule(1, members=2)
    imwa = IMWA(schedule, {"student": student, "teacher": teacher})
    for g, value in enumerate((1.0, 4.0)):
        imwa.before_step(g)
        nn.init.constant_(student[0].weight, value)
        imwa.after_step(g)
    assert student[0].weight.item() == 2.5
    assert teacher[0].weight is student[0].weight


def test_frozen_parameters_are_not_stored():
    run = Run()
    run.student[0].weight.requires_grad_(False)
    schedule = EpisodeSchedule(2, members=2)
    imwa = run.imwa(schedule)
    before = run.student[0].weight.clone()
    run.train(schedule, imwa, steps=[0])
    assert not any(name.endswith(".0.weight") for name in imwa.state_dict()["store"]["start"])
    run.train(schedule, imwa, steps=[1, 2, 3])
    assert torch.equal(run.student[0].weight, before)
    assert torch.equal(run.teacher[0].weight, before)


@pytest.mark.parametrize("members", [1, 2])
def test_frozen_parameter_that_changes_is_an_error(members):
    run = Run()
    run.student[0].bias.requires_grad_(False)
    schedule = EpisodeSchedule(1, members=members)
    imwa = run.imwa(schedule)
    imwa.before_step(0)
    nn.init.ones_(run.student[0].bias)
    with pytest.raises(ValueError, match=r"student\.0\.bias has changed although it required no"):
        imwa.after_step(0)


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter or buffer of \['m'\] can be averaged"):
        IMWA(EpisodeSchedule(1), {"m": nn.Linear(1, 1).requires_grad_(False)})


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
        self.register_buffer("ids", torch.tensor([1, 2]))


def test_infinite_mask_is_no_divergence():
    model = Masked()
    schedule = EpisodeSchedule(1, members=2)
    imwa = IMWA(schedule, {"m": model})
    for g in range(2):
        imwa.before_step(g)
        imwa.after_step(g)
    assert model.mask.tolist() == [0.0, float("-inf")]


def test_buffers_of_a_member_do_not_leak_into_the_next():
    model = Masked()
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model})
    imwa.before_step(0)
    model.mask[0] = 5.0
    imwa.after_step(0)
    assert model.mask[0] == 0


@pytest.mark.parametrize("store", ["dict", "stream"])
def test_integer_buffers_that_differ_are_an_error_and_change_nothing(store):
    model = Masked()
    imwa = IMWA(EpisodeSchedule(1, members=2), {"m": model}, store=store)
    imwa.before_step(0)
    nn.init.constant_(model.weight, 1.0)
    imwa.after_step(0)
    imwa.before_step(1)
    nn.init.constant_(model.weight, 3.0)
    model.ids[1] = 9
    with pytest.raises(ValueError, match=r"m\.ids .* differs between members: 2 and 9"):
        imwa.after_step(1)
    assert model.weight.item() == 3
    model.ids[1] = 2
    assert imwa.after_step(1)
    assert model.weight.item() == 2


# --------------------------------------------------------------------------------------- batch norm


def batchnorm_run(means, variances=(1.0, 1.0), **options):
    model = nn.BatchNorm1d(1)
    imwa = IMWA(EpisodeSchedule(1, members=len(means)), {"m": model}, **options)
    for g, (mean, variance) in enumerate(zip(means, variances, strict=True)):
        imwa.before_step(g)
        model.running_mean.fill_(mean)
        model.running_var.fill_(variance)
        model.num_batches_tracked.fill_(10 - g)
        imwa.after_step(g)
    return model


def test_statistics_are_averaged_and_counters_take_the_largest():
    model = batchnorm_run((0.0, 1.0), (2.0, 4.0))
    assert (model.running_mean.item(), model.running_var.item()) == (0.5, 3)
    assert model.num_batches_tracked.item() == 10


def test_statistics_of_the_last_member_can_be_kept():
    model = batchnorm_run((0.0, 1.0), (2.0, 4.0), bn="keep")
    assert (model.running_mean.item(), model.running_var.item()) == (1, 4)


def test_statistics_can_be_recomputed_on_the_averaged_modules():
    def recompute(modules):
        assert modules["m"].running_mean.item() == 0.5
        modules["m"].running_mean.fill_(-1.0)

    assert batchnorm_run((0.0, 1.0), bn="recompute", recompute_bn=recompute).running_mean == -1


@pytest.mark.parametrize("store", ["dict", "stream"])
def test_means_far_apart_are_warned_about(caplog, store):
    batchnorm_run((0.0, 4.0), store=store)
    assert "differ by 4.0 running standard deviations (m.running_mean)" in caplog.text


def test_means_close_by_are_not_warned_about(caplog):
    batchnorm_run((0.0, 4.0), (2.0, 2.0))
    assert caplog.text == ""


# ----------------------------------------------------------------------------------------- failures


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
    with pytest.raises(FloatingPointError, match=rf"m\.weight of member {spoiled[0]} is not fin"):
        diverging(spoiled, store=store)


@pytest.mark.parametrize("store", ["dict", "stream"])
@pytest.mark.parametrize(
    ("spoiled", "expected"), [([0], 2.5), ([1], 2.0), ([2], 1.5), ([0, 2], 2.0)]
)
def test_member_that_diverges_can_be_dropped(spoiled, expected, store, caplog):
    model, _ = diverging(spoiled, store=store, nonfinite="drop")
    assert model.weight.item() == expected
    assert f"member {spoiled[0]} is not finite" in caplog.text


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


# ------------------------------------------------------------------------------------- coefficients


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


def test_failing_rule_changes_nothing():
    def rule(states):
        raise OSError("no validation images")

    run = Run()
    schedule = EpisodeSchedule(1, members=2)
    imwa = run.imwa(schedule, coefficients=rule)
    run.train(schedule, imwa, steps=[0])
    imwa.before_step(1)
    run.step(1, 0)
    before = run.weights()
    momentum = snapshot({"b": run.optimizer.state[run.student[0].weight]["momentum_buffer"]})
    with pytest.raises(OSError, match="no validation images"):
        imwa.after_step(1)
    assert_same(run.weights(), before)
    after = run.optimizer.state[run.student[0].weight]["momentum_buffer"]
    assert torch.equal(after, momentum["b"])


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


def test_dropping_with_carried_momentum_is_refused():
    with pytest.raises(ValueError, match="would inherit a momentum that is not finite"):
        Run().imwa(EpisodeSchedule(1, members=2), nonfinite="drop", optimizer_state="carry")


def test_choice_of_optimizer_state_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        Run().imwa(EpisodeSchedule(9, episodes=3, members=2), optimizer_state="average")
    assert "2 members, 3 episodes of about 3 iterations, optimizer state: average" in caplog.text
