import os
import signal
import threading

import pytest

from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.signals import SignalHook, StopSignals, stop_signals
from ssod_imwa.engine.trainer import HookBase

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


class KillAt(HookBase):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def after_backward(self):
        if self.trainer.iter == self.step:
            os.kill(os.getpid(), self.number)


def train(trainer, *hooks, checkpoint=lambda: None):
    with StopSignals() as signals:
        hook = SignalHook(signals, checkpoint)
        trainer.register_hooks([*hooks, hook])
        trainer.train()
    return hook


def in_a_fork(function):
    """Exit code of a process that calls a function; 99 where it returns."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            function()
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_signal_finishes_the_step_writes_a_checkpoint_and_tells_the_exit_code(
    tiny, caplog, number, code
):
    saved = []
    trainer = tiny.trainer(6)
    before = signal.getsignal(number)
    hook = train(trainer, KillAt(2, number), checkpoint=lambda: saved.append(trainer.iter))
    assert (saved, trainer.iter, hook.exit_code) == ([2], 3, code)
    assert signal.getsignal(number) is before
    assert "stopping after global step 3" in caplog.text  # people count from 1


def test_without_a_signal_nothing_is_written_and_the_code_is_zero(tiny):
    saved = []
    trainer = tiny.trainer(3)
    hook = train(trainer, checkpoint=lambda: saved.append(1))
    assert (saved, trainer.iter, hook.exit_code, hook.received) == ([], 3, 0, None)


def test_handlers_of_the_caller_are_put_back_and_called(tiny):
    called = []
    outer = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        train(tiny.trainer(4), KillAt(1, signal.SIGTERM))
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, outer)


def test_signal_leaves_a_polling_evaluation(tiny):
    trainer = tiny.trainer(4, episodes=2)
    signals = StopSignals()
    hook = SignalHook(signals, lambda: None)
    batches = []

    def evaluate(model):
        for number in range(100):
            batches.append(number)
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            hook.poll()

    evaluations = Evaluations()
    evaluation = EvaluationHook("evaluate", evaluate, evaluations, stage="average")
    trainer.register_hooks([evaluation, hook])
    with signals:
        trainer.train()
    assert batches == [0, 1, 2, 3]
    assert (trainer.iter, evaluations.records, hook.exit_code) == (2, [], 143)


def test_training_in_a_thread_works_without_handlers(tiny, caplog):
    trainer = tiny.trainer(2)
    thread = threading.Thread(target=train, args=(trainer,))
    thread.start()
    thread.join()
    assert trainer.iter == 2
    assert "main thread" in caplog.text


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_before_training_closes_what_is_open(caplog, number, code):
    before, closed = signal.getsignal(number), []

    def start():
        with StopSignals():
            try:
                os.kill(os.getpid(), number)
            finally:
                closed.append(True)

    with pytest.raises(SystemExit) as stop:
        start()
    assert (stop.value.code, closed) == (code, [True])
    assert signal.getsignal(number) is before
    assert f"{signal.Signals(number).name} received outside training" in caplog.text


def test_training_that_has_ended_serves_signals_no_more(tiny):
    def train_and_stop():
        with StopSignals() as signals:
            trainer = tiny.trainer(1)
            trainer.register_hooks([SignalHook(signals, lambda: None)])
            trainer.train()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        train_and_stop()


def test_nohup_is_obeyed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.parametrize("in_training", [True, False])
def test_second_signal_ends_the_process_at_once_and_abandons_what_is_held(tmp_path, in_training):
    (tmp_path / "run.lock").touch()

    def hang():
        with StopSignals() as signals:
            signals.in_training = in_training
            signals.abandon = (tmp_path / "run.lock").unlink
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:  # as clean-up that hangs
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(98)

    assert in_a_fork(hang) == 143
    assert not list(tmp_path.iterdir())


def test_a_third_signal_kills_what_hangs_in_abandoning():
    def hang():
        with StopSignals() as signals:
            signals.in_training = True
            signals.abandon = lambda: os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_a_fork(hang) == -signal.SIGINT
