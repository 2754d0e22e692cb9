"""Signals end a run cleanly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ssod_imwa.engine.evaluation import EvaluationInterruptedError
from ssod_imwa.engine.trainer import HookBase

logger = logging.getLogger(__name__)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a run: SIGTERM, SIGINT, and SIGHUP, which a closed terminal sends.

    SIGHUP is none where it is ignored, as under nohup, or where the system has no such signal.
    """
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    ignored = hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignored else (hang_up,)))


class StopSignals:
    """While it is entered, a signal ends the run instead of killing the process.

    Before training, and after it, the first one raises SystemExit, so that all that is open is
    closed. While a `SignalHook` trains, it sets a number for the hook to see. A second one ends the
    process at once. On leaving, previous handlers are put back and, if they are functions of the
    caller and training ended, called with the signal that was received.

    Attributes:
        number: of the first signal, None if there was none.
        in_training: whether a hook sees to it that a signal is served.
        abandon: called when a second signal ends the process; it must not wait for anything.

    Example:
        >>> with StopSignals() as signals:
        ...     signals.number is None
        True
    """

    def __init__(self) -> None:
        self._signals = stop_signals()
        self._previous: dict[int, Any] = {}
        self.number: int | None = None
        self.in_training = False
        self.abandon: Callable[[], object] | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals are not handled: training does not run in the main thread")
            return self
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.number is None:
            return
        if kind is SystemExit:
            logger.warning(
                "%s received outside training: nothing was to be saved", name_of(self.number)
            )
            return
        handler = previous.get(self.number)
        # Python's own SIGINT handler would raise KeyboardInterrupt in a run that ended cleanly.
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            # Not sys.exit: clean-up that hangs may be why there is a second signal. If `abandon`
            # hangs, too, a third one kills.
            for each in self._signals:
                signal.signal(each, signal.SIG_DFL)
            if self.abandon is not None:
                self.abandon()
            os._exit(128 + number)
        self.number = number
        if not self.in_training:
            raise SystemExit(128 + number)


class SignalHook(HookBase):
    """Ends training cleanly when a signal came: the step finishes, then a checkpoint, then out.

    The last hook of the list. After each step at which ranks talk, see `Trainer.talks`, all of them
    agree on whether one of them got a signal.

    Args:
        signals: entered by the caller.
        checkpoint: writes a checkpoint of the step that just ended, on all ranks.

    Attributes:
        received: number of the signal that ends the run, None if there was none.
    """

    def __init__(self, signals: StopSignals, checkpoint: Callable[[], object]) -> None:
        self._signals = signals
        self._checkpoint = checkpoint
        self.received: int | None = None
        self._interrupts = False

    @property
    def name(self) -> str:
        return "signals"

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 128 + signal (SIGTERM 143, SIGINT 130), else 0."""
        return 0 if self.received is None else 128 + self.received

    def poll(self) -> None:
        """Leave a long evaluation when a signal has come; evaluation loops call it once a batch.

        Under several ranks it is an exchange: every rank has to call it equally often.

        Raises:
            EvaluationInterruptedError: some rank was told to stop.
        """
        if self.trainer.ranks.run.any_true(self._signals.number is not None):
            self._interrupts = True  # on all ranks: what was left has to be the run's last step
            raise EvaluationInterruptedError("a signal asked the run to stop")

    def before_train(self) -> None:
        self._signals.in_training = True

    def after_step(self) -> None:
        run, number = self.trainer.ranks.run, self._signals.number
        talks = self.trainer.talks or self._interrupts
        if not talks or not run.any_true(number is not None):
            return
        # Ranks that were not signaled themselves exit with the number that another one got.
        self.received = max(other or 0 for other in run.all_gather(number))
        logger.warning(
            "%s received: stopping after global step %d",
            name_of(self.received),
            self.trainer.iter + 1,
        )
        self._checkpoint()
        self.trainer.stop_requested = True

    def after_train(self) -> None:
        self._signals.in_training = False


def name_of(number: int) -> str:
    """A signal's name, such as SIGTERM."""
    return signal.Signals(number).name
