"""IMWA around the real trainer; `tests/averaging` has IMWA around a plain loop."""

from typing import ClassVar

import pytest
import torch

from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.hooks import IMWAHook, LRHook
from ssod_imwa.engine.solver import lr_multiplier
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import NonFiniteError


def add_imwa(trainer, **options):
    imwa = IMWA(trainer.schedule, trainer.method.models(), optimizer=trainer.optimizer, **options)
    trainer.register_hooks([IMWAHook(imwa)])
    return trainer


@pytest.mark.parametrize(("episodes", "members"), [(1, 1), (4, 2), (3, 3), (10, 2)])
def test_every_member_sees_the_base_schedule(tiny, episodes, members):
    """T = 10 is not divisible by 3 or 4."""
    multiplier = lr_multiplier(
        "WarmupMultiStepLR", max_iter=10, steps=(6, 8), warmup_iters=3, warmup_factor=0.1
    )
    seen = {}

    class Spy(HookBase):
        def after_backward(self):
            position = self.trainer.position
            rates = [group["lr"] for group in self.trainer.optimizer.param_groups]
            seen[position.member, position.t] = (*rates, self.trainer.storage.latest()["lr"][0])

    trainer = tiny.trainer(10, episodes=episodes, members=members, lr=0.2)
    trainer.register_hooks([LRHook(multiplier), Spy()])
    add_imwa(trainer)
    trainer.train()
    expected = {(m, t): 0.2 * multiplier(t) for m in range(members) for t in range(10)}
    assert seen == {key: (rate, rate) for key, rate in expected.items()}


@pytest.mark.parametrize("optimizer_state", ["keep", "average"])
@pytest.mark.parametrize("episodes", [1, 2, 5])
def test_one_member_equals_the_plain_trainer_bitwise(tiny, episodes, optimizer_state):
    plain = tiny.trainer(5)
    plain.train()
    wrapped = add_imwa(tiny.trainer(5, episodes=episodes), optimizer_state=optimizer_state)
    wrapped.train()
    for name, model in plain.method.models().items():
        other = wrapped.method.models()[name].state_dict()
        assert tiny.same_state(model.state_dict(), other)


@pytest.mark.parametrize("member", [0, 1])
def test_a_member_of_a_bad_loss_is_dropped_in_float16(tiny, member):
    trainer = tiny.trainer(3, members=2, amp_dtype=torch.float16, drops_members=True)
    good, seen = trainer.method.losses, []

    def losses(batch, t):
        position = trainer.position
        seen.append((position.member, position.t))
        is_bad = (position.member, position.t) == (member, 1)
        return {k: x * (float("nan") if is_bad else 1.0) for k, x in good(batch, t).items()}

    trainer.method.losses = losses
    add_imwa(trainer, nonfinite="drop", member_state={"scaler": trainer.scaler})
    trainer.train()
    assert seen == [(m, t) for m in range(2) for t in range(2 if m == member else 3)]
    assert all(torch.isfinite(p).all() for p in trainer.parameters)


@pytest.mark.parametrize("drops_members", [False, True])
def test_a_method_may_say_itself_that_it_has_diverged(tiny, drops_members):
    """As detectron2's proposals do, before there is a loss."""
    trainer = tiny.trainer(3, members=2, drops_members=drops_members)
    good = trainer.method.losses

    def losses(batch, t):
        if trainer.iter == 4:
            raise FloatingPointError("Training has diverged")
        return good(batch, t)

    trainer.method.losses = losses
    add_imwa(trainer, nonfinite="drop" if drops_members else "raise")
    if drops_members:
        trainer.train()
        assert all(torch.isfinite(p).all() for p in trainer.parameters)
        return
    with pytest.raises(NonFiniteError, match=r"has diverged \(at global step 5 .*SOLVER.BASE_LR"):
        trainer.train()


def test_bad_statistics_of_the_second_member_are_never_averaged(tiny):
    """Batch norm in training mode does not look at its running mean."""

    class Poison(HookBase):
        def after_step(self):
            if self.trainer.iter == 4:
                self.trainer.method.student[1].running_mean[0] = float("nan")

    trainer = tiny.trainer(3, members=2)
    trainer.register_hooks([Poison()])
    add_imwa(trainer)
    with pytest.raises(FloatingPointError, match=r"running_mean is not finite .*member 2/2"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.parameters)


@pytest.mark.parametrize("members", [2, 3])
def test_one_episode_equals_the_mean_of_separate_runs_bitwise(tiny, members):
    """That is vanilla model weight averaging."""
    together = add_imwa(tiny.trainer(5, members=members))
    together.train()
    separate = [tiny.trainer(5, first_member=m) for m in range(members)]
    for trainer in separate:
        trainer.train()
    for name, model in together.method.models().items():
        states = [trainer.method.models()[name].state_dict() for trainer in separate]
        assert not tiny.same_state(states[0], states[1])
        for key, value in model.state_dict().items():
            values = torch.stack([state[key].double() for state in states])
            expected = values.mean(0).to(value.dtype)
            assert torch.equal(value, expected), (name, key)


def test_imwas_state_resumes_in_the_middle_of_a_member(tiny):
    def build():
        return add_imwa(tiny.trainer(6, episodes=2, members=2))

    save = tiny.SaveAt(4)
    straight = build()
    straight.register_hooks([save])
    straight.train()
    resumed = build()
    resumed.load_state_dict(save.read())
    assert resumed.start_iter == 5
    resumed.train()
    for name, model in straight.method.models().items():
        other = resumed.method.models()[name].state_dict()
        assert tiny.same_state(model.state_dict(), other)


def weight_sum(model):
    return {"AP": float(sum(p.double().sum() for p in model.parameters()))}


def test_members_and_averages_are_evaluated_when_they_are_live(tiny):
    evaluations = Evaluations()
    trainer = tiny.trainer(6, episodes=2, members=2)
    trainer.register_hooks([EvaluationHook("members", weight_sum, evaluations, stage="member")])
    add_imwa(trainer)
    trainer.register_hooks([EvaluationHook("averages", weight_sum, evaluations, stage="average")])
    trainer.train()
    students = [r for r in evaluations.records if r["model"] == "student"]
    assert [
        (r["stage"], r["episode"], r["member"], r["global_step"], r["t"]) for r in students
    ] == [
        ("member", 0, 0, 2, 2),
        ("member", 0, 1, 5, 2),
        ("average", 0, None, 5, 2),
        ("member", 1, 0, 8, 5),
        ("member", 1, 1, 11, 5),
        ("final", 1, None, 11, 5),
    ]
    assert len(evaluations.records) == 12  # and the teacher's
    values = [r["metrics"]["AP"] for r in students]
    # The metric is linear in the weights, so an average's is the mean of its members'.
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, rel=1e-5)
    assert values[5] == pytest.approx((values[3] + values[4]) / 2, rel=1e-5)


def build_statistics_method(tiny):
    """A method that sums its losses three times, each sum with another fate at an average."""

    class Summing(tiny.Method):
        at_average: ClassVar = {"mean": "averaged", "log": "shared"}

        def __init__(self):
            super().__init__(tiny.model())
            self.sums = {name: torch.zeros(()) for name in ("queue", "mean", "log")}

        def losses(self, batch, t):
            records = super().losses(batch, t)
            for value in self.sums.values():
                value += records["loss_cls"].detach()
            return records

        def state_dict(self):
            return self.sums

        def load_state_dict(self, state):
            self.sums = dict(state)

    return Summing()


def test_state_of_a_method_becomes_what_it_says_and_resumes_inside_a_member(tiny):
    sums = []

    class Watch(HookBase):
        def after_step(self):
            sums.append({k: v.item() for k, v in self.trainer.method.sums.items()})

    def build(*hooks):
        trainer = tiny.trainer(4, episodes=2, members=2, method=build_statistics_method(tiny))
        trainer.register_hooks([*hooks])
        return add_imwa(trainer, member_state={"method": trainer.method})

    save = tiny.SaveAt(4)
    straight = build(Watch())
    straight.register_hooks([save])
    straight.train()
    logs = [0.0, *(now["log"] for now in sums)]
    losses = [logs[g + 1] - logs[g] for g in range(8)]
    assert sums[3]["queue"] == pytest.approx(losses[2] + losses[3])
    assert sums[5]["queue"] == pytest.approx(sum(losses[i] for i in (0, 1, 4, 5)))
    mean = sum(losses[:4]) / 2
    assert sums[4]["mean"] == pytest.approx(mean + losses[4])
    assert sums[6]["mean"] == pytest.approx(mean + losses[6])
    resumed = build()
    resumed.load_state_dict(save.read())
    resumed.train()
    for name, value in straight.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name])
    assert straight.method.sums["mean"].item() == pytest.approx(mean + sum(losses[4:]) / 2)
