"""Signals end a run cleanly."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ssod_imwa.engine.evaluation import EvaluationInterruptedError
from ssod_imwa.engine.trainer import HookBase

logger = logging.getLogger(__name__)


class SignalHook(HookBase):
    """Ends the run cleanly on SIGTERM or SIGINT: the step finishes, then a checkpoint, then out.

    The last hook of the list. Handlers only set a flag; at the end of each step all ranks agree on
    it. A second signal ends the process at once. Previous handlers are put back when training ends
    and, if they are functions of the caller, called with the signal that was received.

    Args:
        checkpoint: writes a checkpoint of the step that just ended, on all ranks.
        signals: what to catch.

    Attributes:
        received: number of the signal that ends the run, None if there was none.
    """

    def __init__(
        self,
        checkpoint: Callable[[], object],
        *,
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        self._checkpoint = checkpoint
        self._signals = tuple(signals)
        self._previous: dict[int, Any] = {}
        self._flag: int | None = None
        self.received: int | None = None

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
        if self.trainer.ranks.run.any_true(self._flag is not None):
            raise EvaluationInterruptedError("a signal asked the run to stop")

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals are not handled: training does not run in the main thread")
            return
        for number in self._signals:
            self._previous[number] = signal.signal(number, self._handle)

    def after_step(self) -> None:
        if not self.trainer.ranks.run.any_true(self._flag is not None):
            return
        # Ranks that were not signaled themselves exit with the number that another one got.
        self.received = max(number or 0 for number in self.trainer.ranks.run.all_gather(self._flag))
        logger.warning(
            "%s received: stopping after global step %d",
            signal.Signals(self.received).name,
            self.trainer.iter + 1,
        )
        self._checkpoint()
        self.trainer.stop_requested = True

    def after_train(self) -> None:
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        handler = previous.get(self._flag) if self._flag is not None else None
        # Python's own SIGINT handler would raise KeyboardInterrupt in a run that ended cleanly.
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self._flag, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._flag is not None:
            # Not sys.exit: clean-up that hangs may be why there is a second signal.
            os._exit(128 + number)
        self._flag = number
