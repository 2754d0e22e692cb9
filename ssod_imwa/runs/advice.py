"""What numbers around an average say about averaging: one plain line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ssod_imwa.runs.gains import average_gains
from ssod_imwa.runs.results import Evaluation, main_metrics_of

PREFIX = "advice/"

# Shares of the members' loss. Less than a hundredth is within what other images would say.
GAIN = 0.01
# A gain that is one even where the rate has gone: the members differ in more than noise.
LARGE = 0.1
# A tenth of the loss for two passes over images is worth them.
STALE = 0.1
# Twice as long episodes at most double the distance. In runs of configs/digit_images/imwa.yaml with
# 1, 4 and 24 episodes batch norms were stale from about 0.1 on, and 0.3 was another valley.
CLOSE = 0.05
# Noise left by a rate is in proportion to it, and so is what averaging can remove.
ANNEALED = 0.1
# A member whose loss has more than tripled in an episode has lost what it began with: that of a
# student of digits went from 0.3 to 2.5 in 20 steps (docs/results.md). Near 0 it may by chance.
BROKEN = 3.0
NEARLY_NONE = 0.1
# Averages of which a trend is the mean, and the relative change that is one.
TREND = 3
CHANGE = 0.5

UNKNOWN = "what averaging gains could not be measured"


@dataclass(frozen=True)
class AverageNumbers:
    """What was measured around one average, on the same labeled images.

    Attributes:
        members: mean loss of the members that were averaged.
        worst: loss of the worst of them.
        average: loss of the average as training goes on with it.
        recomputed: loss of the average with batch norms re-estimated; None if it has none, or they
            are re-estimated anyway.
        distance: of the last member from the average, relative to its length, see
            `WatchedWeights.distances`; None if not known.
        rate: the learning rate as a share of the highest so far.
    """

    members: float
    worst: float
    average: float
    recomputed: float | None
    distance: float | None
    rate: float

    @property
    def best(self) -> float:
        """Loss of the average with the better of both statistics of batch norms."""
        both = [x for x in (self.average, self.recomputed) if x is not None and not math.isnan(x)]
        return min(both, default=math.nan)

    @property
    def gain(self) -> float:
        """What averaging takes from the members' loss, as a share of it."""
        return _share(self.members - self.average, self.members)

    @property
    def barrier(self) -> float:
        """How far the average is above the worst member, as a share of the members' loss.

        With the better batch norms: stale ones are no barrier between weights.
        """
        return _share(self.best - self.worst, self.members)

    @property
    def stale(self) -> float:
        """What re-estimated batch norms take from the average, as a share of the members' loss."""
        return _share(self.average - self.best, self.members)

    def row(self) -> dict[str, float]:
        """Numbers for metrics.json, by name."""
        numbers = {name: value for name, value in asdict(self).items() if value is not None}
        numbers |= {"gain_percent": 100 * self.gain, "barrier_percent": 100 * self.barrier}
        if self.recomputed is not None:
            numbers["stale_percent"] = 100 * self.stale
        return {PREFIX + name: value for name, value in numbers.items()}


_NAMES = [field.name for field in fields(AverageNumbers)]
_OPTIONAL = ("recomputed", "distance")


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        kind: "unmeasured", "broken", "barrier", "stale", "annealed", "close", "nothing" or "gains".
        text: one line.
    """

    kind: str
    text: str


def advise(course: Sequence[AverageNumbers], *, measured: str = "") -> Advice:
    """The advice after the last of some averages.

    In this order: a loss that is no number says nothing; a member that broke down takes the average
    with it; with a barrier nothing else matters; stale batch norms hide what averaging gains; a
    rate near zero explains a small gain and a small distance; a small distance says that the gain
    can be had with fewer averages.

    Args:
        course: the numbers of the averages up to now, at least one; the last few are enough.
        measured: what the average gained on test images, in words, where it is known.
    """
    now = course[-1]
    apart = "" if now.distance is None else f" (distance {now.distance:.3f})"
    share = _share_in_words(now, measured)
    gains = f"averaging gains {share}{_trend(course)}" if share else UNKNOWN
    if math.isnan(now.best):
        return Advice("unmeasured", f"{gains}: the average's loss is no number")
    before = course[-2].worst if len(course) > 1 else math.inf
    if now.worst > max(BROKEN * before, NEARLY_NONE):
        return Advice(
            "broken",
            f"a member's loss went from {before:.3g} to {now.worst:.3g} in this episode, and the "
            "average goes on with it: lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED "
            "True, and resume from an earlier checkpoint",
        )
    if now.barrier > GAIN:
        return Advice(
            "barrier",
            f"the midpoint is worse than both ends (loss {now.best:.3g}, members up to "
            f"{now.worst:.3g}): members are too far apart{apart}, raise IMWA.EPISODES or START "
            "later",
        )
    if now.stale > STALE or not math.isfinite(now.average):
        return Advice(
            "stale",
            f"{gains}; its batch norms are stale: re-estimated they take its loss from "
            f"{now.average:.3g} to {now.best:.3g}: set IMWA.BN recompute",
        )
    if now.rate < ANNEALED and now.gain < LARGE:
        return Advice(
            "annealed",
            f"the rate has gone to {100 * now.rate:.2g} % of its highest: averaging has nothing "
            f"left to remove (it gains {share})",
        )
    if now.distance is not None and now.distance < CLOSE:
        fewer = "fewer episodes would do" + (", or none" if now.gain < GAIN else "")
        return Advice("close", f"{gains}; members are close{apart}: {fewer}")
    if now.gain < GAIN:
        return Advice("nothing", f"{gains}, members are apart{apart}: raise IMWA.EPISODES")
    return Advice("gains", gains + apart)


def _share_in_words(now: AverageNumbers, measured: str) -> str:
    """What averaging gains; "" if that is not known."""
    is_known = math.isfinite(now.average)
    of_loss = f"{100 * now.gain:.1f} % of the members' loss" if is_known else ""
    return ", ".join(filter(None, (measured, of_loss)))


def _trend(course: Sequence[AverageNumbers]) -> str:
    """How the gain moves, in words, where there are enough averages."""
    gains = [numbers.gain for numbers in course if math.isfinite(numbers.gain)]
    if len(gains) < 2 * TREND or not math.isfinite(course[-1].gain):
        return ""
    before, now = sum(gains[-2 * TREND : -TREND]) / TREND, sum(gains[-TREND:]) / TREND
    if abs(now - before) <= CHANGE * abs(before):
        return ""
    return f", {'falling' if now < before else 'rising'} from {100 * before:.1f} %"


def measured_gain(evaluations: Sequence[Evaluation], episode: int) -> str:
    """What the average of an episode gained over the mean of its members on test images, in words.

    Of the model that is shipped, such as "0.8 AP"; "" if members or average were not evaluated. If
    the figure of one is NaN, because there was nothing to find, the words say so.
    """
    metric = next(iter(main_metrics_of(evaluations)), "")
    gains = [x for x in average_gains(evaluations, metric) if x.episode == episode]
    if not gains:
        return ""
    gain = gains[-1].average - gains[-1].members
    return f"{metric} that could not be measured" if math.isnan(gain) else f"{gain:.1f} {metric}"


def advice_lines(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """What rows of metrics.json say of each average, in words, by episode."""
    numbers = numbers_in(rows)
    course, lines = [], {}
    for episode in [row["episode"] for row in rows if f"{PREFIX}average" in row]:
        if episode in numbers:
            course.append(numbers[episode])
            lines[episode] = advise(course).text
        else:
            lines[episode] = f"{UNKNOWN}: a loss is no number"
    return lines


def numbers_in(rows: Sequence[Mapping[str, Any]]) -> dict[int, AverageNumbers]:
    """The numbers in rows of metrics.json by episode; those of failed measurements are left out."""
    numbers = {}
    for row in rows:
        values: dict[str, Any] = {name: row.get(PREFIX + name) for name in _NAMES}
        if all(values[name] is not None for name in _NAMES if name not in _OPTIONAL):
            numbers[row["episode"]] = AverageNumbers(**values)
    return numbers


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
