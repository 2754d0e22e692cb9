"""How long the rest of a run takes."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from ssod_imwa.averaging.episodes import EpisodeSchedule, Position

# Steps, or evaluations, whose mean duration is taken for those to come.
WINDOW = 200


class TimeLeft:
    """Estimates the rest of a run from what this session has measured and what is still to come.

    What is to come is known: the steps of each phase of the method (burn-in, self-training), and
    the evaluations. The estimate is the sum of

    * the steps left in each phase x the mean duration of the last 200 steps of that phase, so that
      a step that waits for data or starts processes counts with its share,
    * the evaluations left x the mean duration of the last 200 of them,
    * all steps left x the mean of what lies between two steps: averaging, checkpoints, logs.

    What was not measured yet is scaled from what was, by the announced work: passes over images,
    which are right within a factor of two or so. So the estimate is rough until each phase was
    entered and the first evaluations done, and it knows no slowdown that is not announced. The
    first step and the first evaluation of a session, which warm up, count as long as there is no
    other.

    Args:
        schedule: of the run.
        phases: first own iteration of a phase -> work of one of its steps; None is one phase.
        evaluation_work: work of an evaluation.

    Example:
        >>> schedule = EpisodeSchedule(4)
        >>> left = TimeLeft(schedule, {0: 1.0, 2: 3.0}, evaluation_work=5.0)
        >>> left.expect([3], after_row=True)
        >>> left.step(schedule.position(0), 0.5)
        >>> left.seconds(schedule.position(0))  # 1 step of 0.5 s, 2 of 1.5 s, 1 evaluation of 2.5 s
        6.0
    """

    def __init__(
        self,
        schedule: EpisodeSchedule,
        phases: Mapping[int, float] | None = None,
        *,
        evaluation_work: float = 1.0,
    ) -> None:
        work = dict(sorted((phases or {0: 1.0}).items()))
        self._schedule = schedule
        self._starts = list(work)
        self._work = list(work.values())
        # 2g for an evaluation between step g and its row, 2g + 1 for one after the row.
        self._evaluations: list[int] = []
        self._evaluation_work = evaluation_work
        self._recent: list[deque[float]] = [deque(maxlen=WINDOW) for _ in work]
        self._warm_up: tuple[int, float] | None = None
        self._evaluated: list[float] = []
        self._between = 0.0
        self._steps = 0

    def expect(self, steps: Iterable[int], *, after_row: bool) -> None:
        """Count on an evaluation of one model after each of these global steps.

        Args:
            steps: a step may come several times.
            after_row: whether they come after the step's row is written, or before.
        """
        self._evaluations = sorted([*self._evaluations, *(2 * g + after_row for g in steps)])

    def step(self, position: Position, seconds: float) -> None:
        """A step took so long."""
        phase = bisect_right(self._starts, position.t) - 1
        if self._warm_up is None:
            self._warm_up = (phase, seconds)
        else:
            self._recent[phase].append(seconds)
        self._steps += 1

    def between(self, seconds: float) -> None:
        """Between two steps lay so long, evaluations left out."""
        self._between += seconds

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure the evaluation of one model; one that is left does not count."""
        start = time.perf_counter()
        yield
        self._evaluated.append(time.perf_counter() - start)

    @property
    def evaluation_seconds(self) -> float:
        """All evaluations so far."""
        return sum(self._evaluated)

    def seconds(self, position: Position) -> float | None:
        """From the row of a step on; None before the first step."""
        if self._steps == 0:
            return None
        steps = self._steps_left(position)
        step_seconds = sum(
            count * self._step_seconds(phase) for phase, count in enumerate(steps) if count
        )
        evaluations = len(self._evaluations) - bisect_right(
            self._evaluations, 2 * position.global_step
        )
        evaluation = self._evaluation_seconds() if evaluations else 0.0
        between = sum(steps) * self._between / self._steps
        return step_seconds + between + evaluations * evaluation

    def _steps_left(self, position: Position) -> list[int]:
        """Steps of all members in each phase after that at a position."""
        schedule = self._schedule
        first, end = schedule.bounds(position.episode)
        turns = schedule.turns_in(position.episode)
        after = turns - 1 - position.member if turns > 1 else 0  # that follow in the episode
        parts = (
            (position.t + 1, end, 1),
            (first, end, after),
            (end, schedule.iterations, schedule.turns),
        )
        ends = [*self._starts[1:], schedule.iterations]
        return [
            sum(n * max(0, min(stop, last) - max(start, t)) for t, last, n in parts)
            for start, stop in zip(self._starts, ends, strict=True)
        ]

    def _step_seconds(self, phase: int) -> float:
        recent = self._recent[phase]
        if recent:
            return sum(recent) / len(recent)
        return self._seconds_of_work(self._work[phase])

    def _evaluation_seconds(self) -> float:
        if self._evaluated:
            recent = self._evaluated[1:][-WINDOW:] or self._evaluated
            return sum(recent) / len(recent)
        return self._seconds_of_work(self._evaluation_work)

    def _seconds_of_work(self, work: float) -> float:
        """What so much work takes, by the latest phase that was measured."""
        for phase in reversed(range(len(self._work))):
            recent = self._recent[phase]
            if recent:
                return work * sum(recent) / len(recent) / self._work[phase]
        assert self._warm_up is not None
        phase, seconds = self._warm_up
        return work * seconds / self._work[phase]
