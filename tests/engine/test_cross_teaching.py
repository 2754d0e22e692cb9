import pytest
import torch

from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.engine.cross_teaching import CrossTeachingHook
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.trainer import HookBase


class Watch(HookBase):
    """Remembers what is lent in each step, and the teacher at each member's end."""

    def __init__(self, tiny):
        self.copied, self.lent, self.ends = tiny.copied_state, {}, {}

    def after_backward(self):
        position, other = self.trainer.position, self.trainer.method.other_teacher
        place = (position.episode, position.member, position.t)
        self.lent[place] = None if other is None else self.copied(other)

    def after_step(self):
        position = self.trainer.position
        if position.ends_member:
            teacher = self.trainer.method.teacher.model
            self.ends[position.episode, position.member] = self.copied(teacher)


def build(tiny, *, members=3, burn_in=0, hooks=(), spoil=None, **options):
    trainer = tiny.trainer(6, episodes=3, members=members, method=tiny.method(burn_in=burn_in))
    imwa = IMWA(trainer.schedule, trainer.method.models(), optimizer=trainer.optimizer, **options)
    watch = Watch(tiny)
    before = [] if spoil is None else [spoil]
    trainer.register_hooks([*before, watch, CrossTeachingHook(), IMWAHook(imwa), *hooks])
    return trainer, watch


@pytest.mark.parametrize("members", [2, 3])
def test_a_member_is_lent_the_next_ones_teacher_of_the_last_average(tiny, members):
    trainer, watch = build(tiny, members=members)
    trainer.train()
    for (episode, member, _), lent in watch.lent.items():
        if episode == 0:
            assert lent is None
        else:
            assert tiny.same_state(lent, watch.ends[episode - 1, (member + 1) % members])
    assert not tiny.same_state(watch.ends[0, 0], watch.ends[0, 1])


def test_lending_changes_no_training_of_a_method_that_does_not_ask(tiny):
    plain = tiny.trainer(6, episodes=3, members=3)
    imwa = IMWA(plain.schedule, plain.method.models(), optimizer=plain.optimizer)
    plain.register_hooks([IMWAHook(imwa)])
    lending, _ = build(tiny)
    for trainer in (plain, lending):
        trainer.train()
    states = [tiny.copied_state(trainer.method.student) for trainer in (plain, lending)]
    assert tiny.same_state(*states)


@pytest.mark.parametrize("step", range(4, 13))
def test_a_resumed_run_lends_the_same(tiny, step):
    save = tiny.SaveAt(step)
    straight, expected = build(tiny, hooks=[save])
    straight.train()
    resumed, watch = build(tiny)
    resumed.load_state_dict(save.read())
    resumed.train()
    assert len(watch.lent) == 18 - step - 1
    assert all(
        (lent is None and expected.lent[place] is None)
        or tiny.same_state(lent, expected.lent[place])
        for place, lent in watch.lent.items()
    )


def test_a_resume_may_begin_with_it(tiny):
    trainer, watch = build(tiny)
    trainer.hooks[1].load_state_dict({})
    trainer.train()
    assert any(lent is not None for lent in watch.lent.values())


def test_a_teacher_that_has_not_started_is_not_lent(tiny):
    trainer, watch = build(tiny, burn_in=4)  # of two episodes
    trainer.train()
    assert {place[0] for place, lent in watch.lent.items() if lent is not None} == {2}


def test_a_teacher_that_diverged_is_not_lent(tiny):
    class Spoil(HookBase):
        def after_step(self):
            position = self.trainer.position
            if (position.episode, position.member) == (0, 1) and position.ends_member:
                for model in self.trainer.method.models().values():
                    next(model.parameters()).detach().fill_(torch.nan)

    trainer, watch = build(tiny, spoil=Spoil(), nonfinite="drop")
    trainer.train()
    of_second = {place[1] for place, lent in watch.lent.items() if place[0] == 1 and lent is None}
    assert of_second == {0}  # who learns from member 1
    assert all(lent is not None for place, lent in watch.lent.items() if place[0] == 2)


def test_no_more_copies_wait_than_there_are_members(tiny):
    class Count(HookBase):
        most = 0

        def after_step(self):
            hook = next(h for h in self.trainer.hooks if isinstance(h, CrossTeachingHook))
            state = hook.state_dict()
            self.most = max(self.most, len(state["waiting"]) + len(state["finished"]))

    count = Count()
    trainer, _ = build(tiny, hooks=[count])
    trainer.train()
    assert count.most == 3
    hook = next(h for h in trainer.hooks if isinstance(h, CrossTeachingHook))
    assert hook.state_dict() == {"waiting": {}, "finished": {}}
