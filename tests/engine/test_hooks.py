import os
import signal
import threading

import pytest
import torch

from ssod_imwa.engine.evaluation import EvaluationHook, EvaluationInterruptedError, Evaluations
from ssod_imwa.engine.signals import SignalHook
from ssod_imwa.engine.trainer import HookBase


def weight_sum(model):
    return {"AP": float(sum(p.double().sum() for p in model.parameters()))}


def add_evaluation(trainer, evaluations=None, *, evaluate=weight_sum, stage="average", **options):
    evaluations = Evaluations() if evaluations is None else evaluations
    name = f"evaluate_{stage}"
    hook = EvaluationHook(name, evaluate, evaluations, stage=stage, **options)
    trainer.register_hooks([hook])
    return evaluations


@pytest.mark.parametrize(("period", "expected"), [(0, [4]), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4])])
def test_period_counts_episodes_and_the_last_is_always_evaluated(tiny, period, expected):
    trainer = tiny.trainer(5, episodes=5)
    evaluations = add_evaluation(trainer, period=period)
    trainer.train()
    students = [r for r in evaluations.records if r["model"] == "student"]
    assert [r["episode"] for r in students] == expected


def test_a_teacher_that_is_not_ready_is_not_evaluated(tiny):
    trainer = tiny.trainer(4, episodes=2, method=tiny.method(burn_in=4))
    evaluations = add_evaluation(trainer)
    trainer.train()
    assert [(r["episode"], r["model"]) for r in evaluations.records] == [
        (0, "student"),
        (1, "student"),
        (1, "teacher"),
    ]


def test_evaluation_does_not_change_training(tiny):
    plain, evaluated = tiny.trainer(4, episodes=4), tiny.trainer(4, episodes=4)
    add_evaluation(evaluated, evaluate=lambda model: {"x": torch.rand(1).item()})
    plain.train()
    evaluated.train()
    states = [t.method.student.state_dict() for t in (plain, evaluated)]
    assert tiny.same_state(*states)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_evaluation_lost_between_checkpoint_and_its_end_is_made_up_for(tiny, step):
    """Step 2 and 5 end an episode, 5 also the run; after step 3 nothing is due."""

    def build(save):
        trainer = tiny.trainer(6, episodes=2)
        trainer.register_hooks([save])
        return trainer, add_evaluation(trainer)

    save = tiny.SaveAt(step)
    straight, expected = build(save)
    straight.train()
    resumed, evaluations = build(tiny.SaveAt(None))
    resumed.load_state_dict(save.read())
    assert len(evaluations.records) == (2 if step > 2 else 0)
    resumed.train()
    assert evaluations.records == expected.records


def test_interrupted_evaluation_leaves_no_record_and_training_goes_on(tiny):
    def interrupted(model):
        raise EvaluationInterruptedError

    trainer = tiny.trainer(2)
    evaluations = add_evaluation(trainer, evaluate=interrupted)
    trainer.train()
    assert evaluations.records == []
    assert trainer.iter == 2


@pytest.mark.parametrize("options", [{"stage": "final"}, {"period": -1}])
def test_bad_evaluation_arguments_are_errors(tiny, options):
    with pytest.raises(ValueError, match="is not allowed"):
        add_evaluation(tiny.trainer(), **options)


class KillAt(HookBase):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def after_backward(self):
        if self.trainer.iter == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_writes_a_checkpoint_and_tells_the_exit_code(
    tiny, caplog, number, code
):
    saved = []
    trainer = tiny.trainer(6)
    hook = SignalHook(lambda: saved.append(trainer.iter))
    trainer.register_hooks([KillAt(2, number), hook])
    before = signal.getsignal(number)
    trainer.train()
    assert (saved, trainer.iter, hook.exit_code) == ([2], 3, code)
    assert signal.getsignal(number) is before
    assert "stopping after global step 3" in caplog.text  # people count from 1


def test_without_a_signal_nothing_is_written_and_the_code_is_zero(tiny):
    saved = []
    trainer = tiny.trainer(3)
    hook = SignalHook(lambda: saved.append(1))
    trainer.register_hooks([hook])
    trainer.train()
    assert (saved, trainer.iter, hook.exit_code, hook.received) == ([], 3, 0, None)


def test_handlers_of_the_caller_are_put_back_and_called(tiny):
    called = []
    outer = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        trainer = tiny.trainer(4)
        trainer.register_hooks([KillAt(1, signal.SIGTERM), SignalHook(lambda: None)])
        trainer.train()
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_signal_leaves_a_polling_evaluation(tiny):
    trainer = tiny.trainer(4, episodes=2)
    hook = SignalHook(lambda: None)
    batches = []

    def evaluate(model):
        for number in range(100):
            batches.append(number)
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            hook.poll()

    evaluations = add_evaluation(trainer, evaluate=evaluate)
    trainer.register_hooks([hook])
    trainer.train()
    assert batches == [0, 1, 2, 3]
    assert (trainer.iter, evaluations.records, hook.exit_code) == (2, [], 143)


def test_training_in_a_thread_works_without_handlers(tiny, caplog):
    trainer = tiny.trainer(2)
    trainer.register_hooks([SignalHook(lambda: None)])
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.iter == 2
    assert "main thread" in caplog.text


def test_second_signal_ends_the_process_at_once():
    """In a process of its own; the trainer is a stand-in, so that torch's loop is not needed."""
    pid = os.fork()
    if pid == 0:
        hook = SignalHook(lambda: None)
        hook.before_train()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143


def add_running(trainer, polling, evaluations):
    """Evaluations after every second own iteration; `polling` stands for one that can be left."""
    hook = EvaluationHook(
        "running",
        polling,
        evaluations,
        stage="running",
        period=2,
        evaluate_to_end=weight_sum,
    )
    trainer.register_hooks([hook])
    return evaluations


def interrupted(model):
    raise EvaluationInterruptedError


def test_a_member_that_is_about_to_be_swapped_out_is_evaluated_to_the_end(tiny):
    """Its weights are gone afterwards; inside its part the evaluation can be made up for."""
    trainer = tiny.trainer(4, members=2)
    evaluations = add_running(trainer, interrupted, Evaluations())
    trainer.train()
    assert [(r["member"], r["t"]) for r in evaluations.records if r["model"] == "student"] == [
        (0, 3),
        (1, 3),
    ]


def test_an_evaluation_that_is_made_up_for_is_not_interrupted_again(tiny):
    """Afterwards training goes on, and the weights of its step are gone."""
    save = tiny.SaveAt(1)
    first = tiny.trainer(3)
    lost = add_running(first, interrupted, Evaluations())
    first.register_hooks([save])
    first.train()
    assert lost.records == []
    resumed = tiny.trainer(3)
    evaluations = add_running(resumed, interrupted, Evaluations())
    resumed.load_state_dict(save.read())
    resumed.train()
    assert [(r["model"], r["t"]) for r in evaluations.records] == [("student", 1), ("teacher", 1)]
