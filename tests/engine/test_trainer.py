import io
import random

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.engine.seeding import seed_everything
from ssod_imwa.engine.solver import gradient_clipper
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import NonFiniteError


class Recorder(HookBase):
    """Writes down at which point and step it was called."""

    def __init__(self, label, calls):
        self.label, self.calls = label, calls

    @property
    def name(self):
        return self.label

    def note(self, point):
        self.calls.append((self.label, point, self.trainer.iter))

    def before_train(self):
        self.note("before_train")

    def before_step(self):
        self.note("before_step")

    def after_backward(self):
        self.note("after_backward")

    def after_step(self):
        self.note("after_step")

    def after_train(self):
        self.note("after_train")


def test_hooks_are_called_in_the_documented_order(tiny):
    calls, points = [], ["before_step", "after_backward", "after_step"]
    trainer = tiny.trainer(2)
    trainer.register_hooks([Recorder("a", calls), Recorder("b", calls)])
    trainer.train()
    expected = [("a", "before_train", 0), ("b", "before_train", 0)]
    expected += [(label, point, step) for step in (0, 1) for point in points for label in "ab"]
    assert calls == [*expected, ("a", "after_train", 2), ("b", "after_train", 2)]


def test_second_hook_of_a_name_is_refused(tiny):
    trainer = tiny.trainer()
    with pytest.raises(ValueError, match="hook name 'a' is taken"):
        trainer.register_hooks([Recorder("a", []), Recorder("a", [])])


def test_all_hooks_clean_up_even_if_the_loop_and_one_of_them_fail(tiny):
    class Failing(HookBase):
        def before_step(self):
            raise ZeroDivisionError

        def after_train(self):
            raise OSError("disk full")

    calls = []
    trainer = tiny.trainer()
    trainer.register_hooks([Failing(), Recorder("b", calls)])
    with pytest.raises(OSError, match="disk full") as error:
        trainer.train()
    assert isinstance(error.value.__context__, ZeroDivisionError)
    assert calls[-1] == ("b", "after_train", 0)


def test_a_hook_written_for_detectron2_works(tiny):
    """It uses what detectron2's own hooks use: no position, no base class of ours."""

    class BestLoss:
        name = "BestLoss"
        trainer = None

        def before_train(self):
            self.best, self.steps = float("inf"), self.trainer.max_iter - self.trainer.start_iter

        def before_step(self): ...

        def after_backward(self): ...

        def after_step(self):
            latest = self.trainer.storage.latest()["total_loss"]
            assert latest[1] == self.trainer.iter
            self.best = min(self.best, latest[0])
            if self.trainer.iter + 1 == self.trainer.max_iter:
                self.trainer.storage.put_scalar("best", self.best, smoothing_hint=False)

        def after_train(self): ...

        def state_dict(self):
            return {}

    trainer = tiny.trainer(5)
    hook = BestLoss()
    trainer.register_hooks([hook])
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert hook.steps == len(losses) == 5
    assert trainer.storage.latest()["best"] == (min(losses), 4)


def test_training_equals_a_plain_loop(tiny):
    trainer = tiny.trainer(5)
    trainer.train()
    model = tiny.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for t, batch in enumerate(tiny.batches(trainer.schedule)(0)):
        seed_everything(7, "step", 0, t, 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    assert tiny.same_state(model.state_dict(), trainer.method.student.state_dict())


def test_weights_do_not_depend_on_random_numbers_that_others_draw(tiny):
    class Thief(HookBase):
        def after_step(self):
            torch.rand(3), np.random.rand(), random.random()

    plain, robbed = tiny.trainer(4), tiny.trainer(4)
    robbed.register_hooks([Thief()])
    plain.train()
    robbed.train()
    assert tiny.same_state(plain.method.student.state_dict(), robbed.method.student.state_dict())


class OfTwo(Group):
    """A rank whose partner has nothing to say."""

    def all_true(self, flag):
        return bool(flag)


def test_ranks_draw_different_dropout_masks(tiny):
    trainers = [tiny.trainer(1, ranks=Ranks(batch=OfTwo(rank, 2))) for rank in (0, 1)]
    for trainer in trainers:
        trainer.train()
    states = [trainer.method.student.state_dict() for trainer in trainers]
    assert not tiny.same_state(*states)


def test_only_names_that_begin_with_loss_are_summed(tiny):
    trainer = tiny.trainer(1)
    trainer.train()
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["total_loss"] == latest["loss_cls"]
    assert 0 <= latest["accuracy"] <= 1
    assert latest["time"] >= latest["data_time"] > 0


def test_a_batch_without_a_loss_is_an_error(tiny):
    method = tiny.method()
    method.losses = lambda batch, t: {"accuracy": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="no loss in"):
        tiny.trainer(method=method).train()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(tiny, parts):
    """Without batch statistics and dropout, which depend on how a batch is cut."""
    options = {"dropout": 0.0, "norm": False}
    whole = tiny.trainer(5, method=tiny.method(**options))
    cut = tiny.trainer(5, method=tiny.method(**options), accumulation=parts)
    whole.train()
    cut.train()
    for one, other in zip(whole.parameters, cut.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    losses = [trainer.storage.history("total_loss").values() for trainer in (whole, cut)]
    assert [v for v, _ in losses[0]] == pytest.approx([v for v, _ in losses[1]], rel=1e-5)


def test_clipping_happens_before_the_step(tiny):
    trainer = tiny.trainer(1, clip=gradient_clipper("norm", 1e-3), lr=1.0)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.train()
    changes = [p.detach() - q for p, q in zip(trainer.parameters, before, strict=True)]
    assert float(nn.utils.get_total_norm(changes)) == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_computes_in_half_and_keeps_weights_in_float32(tiny):
    seen = []
    method = tiny.method()
    method.student[0].register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    trainer = tiny.trainer(30, method=method, amp_dtype=torch.bfloat16)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.parameters)
    assert not trainer.scaler.is_enabled()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    reference = tiny.trainer(30)
    reference.train()
    full = [value for value, _ in reference.storage.history("total_loss").values()]
    assert losses != full
    assert losses == pytest.approx(full, rel=0.05)


def snapshot(trainer):
    models = trainer.method.models().values()
    return [x.detach().clone() for model in models for x in model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_loss_stops_at_its_step_with_weights_untouched(tiny, bad):
    method = tiny.method()
    good, kept = method.losses, []

    def losses(batch, t):
        kept.append(snapshot(trainer))
        records = good(batch, t)
        return {**records, "loss_cls": records["loss_cls"] * (bad if t == 3 else 1)}

    method.losses = losses
    trainer = tiny.trainer(6, method=method)
    where = r"global step 4 \(episode 1/1, member 1/1, iteration 4/6\)"
    with pytest.raises(NonFiniteError, match=where):
        trainer.train()
    assert len(kept) == 4
    assert equal(kept[-1], snapshot(trainer))
    assert not trainer.optimizer.state or all(
        torch.isfinite(s["momentum_buffer"]).all() for s in trainer.optimizer.state.values()
    )


def test_bad_gradient_of_a_finite_loss_stops_with_weights_untouched(tiny):
    class Poison(HookBase):
        def after_backward(self):
            if self.trainer.iter == 2:
                self.kept = snapshot(self.trainer)
                self.trainer.parameters[1].grad[0] = float("inf")

    trainer, poison = tiny.trainer(6), Poison()
    trainer.register_hooks([poison])
    with pytest.raises(NonFiniteError, match="global step 3 "):
        trainer.train()
    assert equal(poison.kept, snapshot(trainer))


class PoisonAlways(HookBase):
    def after_backward(self):
        self.trainer.parameters[1].grad[0] = float("inf")


def test_float16_skips_overflows_and_stops_when_nothing_else_comes(tiny):
    trainer = tiny.trainer(30, amp_dtype=torch.float16)
    before = snapshot(trainer)[: len(trainer.parameters)]
    trainer.register_hooks([PoisonAlways()])
    with pytest.raises(NonFiniteError, match="every loss scale at global step 17 "):
        trainer.train()  # from 65536 to 1/2 in 17 steps
    assert equal(before, trainer.parameters)


def test_float16_trains_as_float32_does(tiny):
    half, full = tiny.trainer(10, amp_dtype=torch.float16), tiny.trainer(10)
    half.train()
    full.train()
    losses = [[v for v, _ in t.storage.history("total_loss").values()] for t in (half, full)]
    assert half.scaler.is_enabled()
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_bad_parameter_of_the_second_member_is_named(tiny):
    class Poison(HookBase):
        def before_step(self):
            if self.trainer.iter == 4:
                self.trainer.parameters[0].data[0, 0] = float("nan")

    trainer = tiny.trainer(3, members=2)
    trainer.register_hooks([Poison()])
    with pytest.raises(NonFiniteError, match="member 2/2, iteration 2/3"):
        trainer.train()


def test_stopping_ends_after_the_current_step(tiny):
    class Stop(HookBase):
        def after_step(self):
            self.trainer.stop_requested = self.trainer.iter == 2

    trainer = tiny.trainer(6)
    trainer.register_hooks([Stop()])
    trainer.train()
    assert trainer.iter == 3
    assert len(trainer.storage.history("total_loss").values()) == 3


def test_state_restores_the_trainer_and_the_state_of_hooks(tiny):
    class Counter(HookBase):
        count = 0

        def after_step(self):
            self.count += 1
            if self.trainer.iter == 2:
                torch.save(self.trainer.state_dict(), self.path)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    def build(path):
        trainer, hook = tiny.trainer(6), Counter()
        hook.path = path
        trainer.register_hooks([hook])
        return trainer, hook

    file = io.BytesIO()
    straight, _ = build(file)
    straight.train()
    file.seek(0)
    resumed, hook = build(io.BytesIO())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert (resumed.start_iter, hook.count) == (3, 3)
    resumed.train()
    assert hook.count == 6
    for name, model in straight.method.models().items():
        assert tiny.same_state(model.state_dict(), resumed.method.models()[name].state_dict())
