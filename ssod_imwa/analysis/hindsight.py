"""What a finished run of one member says about averaging, in hindsight: one line a question."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Points. "Converged" in docs/results.md is that twice the steps gain less; few test sets show less.
POINTS = 0.5
# Share of the highest rate below which nothing is left to average, as in `advice.ANNEALED`, and
# above which it was not lowered (steps and cosines go far below).
ANNEALED = 0.1
LOWERED = 0.5
# Evaluations below which a slope is a guess.
ENOUGH = 4
# How far the metric on training images is above that on others, as a share of what is left to 100:
# below the first they are not learned yet, above the second more steps have little to teach.
UNLEARNED = 0.25
LEARNED = 0.75


@dataclass(frozen=True)
class Trend:
    """The line through the evaluations of a run's second half.

    Attributes:
        rise: of the metric over that half, in points.
        error: its standard error; evaluations that lie on one side of the line for long, as those
            of an average over many iterations do, count as fewer than they are.
        evaluations: how many these are.
    """

    rise: float
    error: float
    evaluations: int

    @property
    def is_rising(self) -> bool:
        """More than `POINTS`, and more than chance would bring in 19 of 20 cases."""
        return self.rise > POINTS and self.rise > 2 * self.error

    @property
    def is_flat(self) -> bool:
        """Not rising, and so well measured that a rise of 4 `POINTS` would have been seen."""
        return not self.is_rising and self.rise + 2 * self.error <= 4 * POINTS


def trend(points: Sequence[tuple[float, float]], iterations: int) -> Trend | None:
    """The trend of evaluations (own iteration, metric in points) of a run of T iterations.

    Returns:
        None if its second half has too few.

    Example:
        >>> trend([(50, 30.0), (60, 40.0), (70, 41.0), (80, 42.0), (100, 44.0)], 100)
        Trend(rise=5.0, error=0.0, evaluations=4)
    """
    late = [(t, y) for t, y in points if t > iterations / 2 and not math.isnan(y)]
    if len(late) < ENOUGH:
        return None
    mean_t, mean_y = (statistics.fmean(values) for values in zip(*late, strict=True))
    spread = sum((t - mean_t) ** 2 for t, _ in late)
    slope = sum((t - mean_t) * (y - mean_y) for t, y in late) / spread
    residuals = [y - mean_y - slope * (t - mean_t) for t, y in late]
    squares = sum(r * r for r in residuals)
    error = math.sqrt(squares / (len(late) - 2) / spread * _repetition(residuals))
    # Rounded: the noise of floats is no trend.
    half = iterations / 2
    return Trend(round(slope * half, 9), round(error * half, 9), len(late))


def _repetition(residuals: Sequence[float]) -> float:
    """How many evaluations say what one would, from the correlation r of neighbors: (1+r)/(1-r)."""
    squares = sum(r * r for r in residuals)
    neighbors = sum(a * b for a, b in itertools.pairwise(residuals))
    correlation = max(0.0, neighbors / squares) if squares else 0.0
    return (1 + correlation) / (1 - correlation)


@dataclass(frozen=True)
class RunNumbers:
    """What was measured on a finished run.

    Attributes:
        metric: what figures are of, in points.
        student: of the last student.
        teacher: of its moving average; None if it has none.
        lawa: of the mean of the last students; None if only one is there.
        snapshots: how many that mean is of.
        rate: the last learning rate as a share of the highest.
        trend: of the shipped model's evaluations.
        training: of the shipped model on labeled training images; None if it was not measured.
    """

    metric: str
    student: float
    teacher: float | None
    lawa: float | None
    snapshots: int
    rate: float
    trend: Trend | None
    training: float | None = None

    @property
    def learned(self) -> float | None:
        """How far training images are fit better than others, as a share of what is left to 100.

        None if it was not measured, or of a student at a high rate, which fits neither: that is
        noise, and tells nothing.
        """
        shipped = self.student if self.teacher is None else self.teacher
        is_noisy = self.teacher is None and self.rate >= LOWERED
        if self.training is None or is_noisy or shipped >= 100:
            return None
        return (self.training - shipped) / (100 - shipped)

    @property
    def is_learned(self) -> bool:
        """More steps have little to teach: training images are known to be fit far better."""
        return self.learned is not None and self.learned > LEARNED

    @property
    def noise(self) -> float | None:
        """What averaging over time takes from the student, in points: the noise of its rate."""
        means = [x for x in (self.teacher, self.lawa) if x is not None]
        return max(means) - self.student if means else None


@dataclass(frozen=True)
class Answer:
    """Whether something would have paid.

    Attributes:
        question: what.
        verdict: "yes", "no" or "unclear"; of `advice` what to do.
        reason: with numbers.
    """

    question: str
    verdict: str
    reason: str

    def line(self) -> str:
        """For people."""
        return f"{self.question:13} {self.verdict:8} {self.reason}"


def answers(run: RunNumbers) -> list[Answer]:
    """Whether a longer run, a lower rate, an EMA, LAWA or IMWA would have paid."""
    return [_longer(run), _lower_rate(run), _ema(run), _lawa(run), _imwa(run)]


def advice(run: RunNumbers) -> Answer:
    """What to do: a "longer run", ship the "EMA" or the mean of snapshots ("LAWA"), or "nothing".

    A run that still rises is trained longer, with what averages it keeps. Else the better average
    is shipped, if it is better than the last student by `POINTS`: it costs no steps, where IMWA
    would remove the same noise with M times as many.
    """
    longer = _longer(run)
    if longer.verdict == "yes":
        return Answer("advice", "longer run", f"first of all: {longer.reason}")
    gains = {
        name: value - run.student
        for name, value in (("EMA", run.teacher), ("LAWA", run.lawa))
        if value is not None
    }
    name = max(gains, key=lambda name: gains[name], default=None)
    if name is None or gains[name] < POINTS:
        return Answer("advice", "nothing", "the last student is as good as what was measured")
    other = "; a rate that falls may do the same" if run.rate >= LOWERED else ""
    return Answer("advice", name, f"ship it: {_beside(gains[name], run)}, for no steps{other}")


def _longer(run: RunNumbers) -> Answer:
    question, course, learned = "longer run", run.trend, run.learned
    # Read where `learned` is known, and with it the training images' figure.
    on_training = f"{run.training or 0:.1f} {run.metric} on training images"
    if learned is not None and learned < UNLEARNED and (course is None or not course.is_flat):
        return Answer(question, "yes", f"{on_training}: they are fit hardly better than others")
    if course is None:
        few = f"fewer than {ENOUGH} evaluations of {run.metric} in the second half"
        return Answer(question, "unclear", f"{few} (TEST.EVAL_PERIOD)")
    reason = (
        f"{run.metric} rose by {course.rise:.1f} ± {course.error:.1f} over the second half "
        f"({course.evaluations} evaluations)"
    )
    if course.is_rising and run.rate < LOWERED:
        return Answer(question, "unclear", f"{reason}, in which the rate fell: that may be why")
    if course.is_rising and run.is_learned:
        return Answer(question, "unclear", f"{reason}, but {on_training}: they are learned")
    if course.is_rising:
        return Answer(question, "yes", reason)
    if not course.is_flat:
        return Answer(question, "unclear", f"{reason}: too noisy to tell")
    return Answer(question, "no", f"{reason}: saturated")


def _lower_rate(run: RunNumbers) -> Answer:
    question, left = "lower rate", f"the rate ended at {100 * run.rate:.3g} % of its highest"
    if run.rate < LOWERED:
        return Answer(question, "no", f"{left}: it was lowered")
    if run.noise is None:
        return Answer(question, "unclear", f"{left}, and there is no average to tell its noise")
    gain = f"averages over time are {_beside(run.noise, run)}"
    if run.noise < POINTS:
        return Answer(question, "no", f"{left}, but {gain}: little noise to remove")
    return Answer(question, "yes", f"{left}, and {gain}: lowering it removes that noise for free")


def _ema(run: RunNumbers) -> Answer:
    if run.teacher is not None:
        return _compared("EMA", run.teacher - run.student, run, "the teacher is")
    if run.lawa is None:
        return Answer("EMA", "unclear", "the run kept none, and only one snapshot")
    what = f"the run kept none; the mean of its last {run.snapshots} snapshots is"
    return _compared("EMA", run.lawa - run.student, run, what)


def _lawa(run: RunNumbers) -> Answer:
    if run.lawa is None:
        keep = "the run kept only one snapshot (IMWA.LAWA, or SOLVER.CHECKPOINT_KEEP, keep more)"
        return Answer("LAWA", "unclear", keep)
    what = f"the mean of the last {run.snapshots} snapshots is"
    return _compared("LAWA", run.lawa - run.student, run, what)


def _compared(question: str, gain: float, run: RunNumbers, what: str) -> Answer:
    verdict = "yes" if gain >= POINTS else "no"
    return Answer(question, verdict, f"{what} {_beside(gain, run)}")


def _beside(gain: float, run: RunNumbers) -> str:
    side = "above" if gain >= 0 else "below"
    return f"{abs(gain):.1f} {run.metric} {side} the last student"


def _imwa(run: RunNumbers) -> Answer:
    question = "IMWA"
    if run.rate < ANNEALED:
        gone = f"the rate ended at {100 * run.rate:.3g} % of its highest: nothing is left to remove"
        return Answer(question, "no", f"{gone}, unless members differ in more than noise")
    if run.trend is not None and run.trend.is_rising and not run.is_learned:
        return Answer(question, "no", "the run is not saturated: the steps are better spent on it")
    if run.noise is None or run.trend is None:
        return Answer(question, "unclear", "noise or trend of the run are not known, see above")
    if run.teacher is not None and (run.lawa or 0) - run.teacher < POINTS:
        return Answer(question, "no", "the EMA has removed the noise already")
    if run.noise < POINTS:
        return Answer(question, "no", f"only {run.noise:.1f} {run.metric} of noise to remove")
    return Answer(
        question,
        "yes" if run.trend.is_flat else "unclear",
        f"{'saturated' if run.trend.is_flat else 'perhaps saturated'}, and averages over time are "
        f"{_beside(run.noise, run)}; but a lower rate, EMA or LAWA remove the same noise in fewer "
        "steps, unless members differ in more than noise",
    )
