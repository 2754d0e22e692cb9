"""How long episodes are that follow the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def lengths_by_rate(rates: Sequence[float], episodes: int) -> list[int]:
    """Lengths inversely proportional to the squared rate, for a given number of episodes.

    The quadratic synchronization rule (Gu et al., arXiv 2310.14423, eq. 2) lets H = (alpha / eta)^2
    iterations pass between two averages at the rate eta. Here the number of averages is given, and
    alpha follows from it: episode e ends with the last iteration by which the sum of eta^2 is at
    most e / E of the whole. So a constant rate gives the lengths of `EpisodeSchedule`, and a
    warm-up is in a long first episode. Every episode has at least one iteration.

    Args:
        rates: of the iterations that are divided, in order; in any unit, at least 0.
        episodes: E.

    Raises:
        ValueError: fewer iterations than episodes have a rate above 0.

    Example:
        >>> lengths_by_rate([4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0], 4)
        [1, 1, 1, 4]
    """
    positive = sum(rate > 0 for rate in rates)
    if positive < episodes:
        raise ValueError(
            f"episodes = {episodes} is not allowed (must be 1..{positive}, the iterations with a "
            "rate above 0)"
        )
    done = list(accumulate(_squares(rates), initial=0))
    begins = [0]
    t = 0
    for e in range(1, episodes):
        while episodes * done[t + 1] <= e * done[-1]:
            t += 1
        # One iteration for each episode before and behind.
        begins.append(min(max(t, begins[-1] + 1), len(rates) - episodes + e))
    return [end - first for first, end in pairwise([*begins, len(rates)])]


def _squares(rates: Sequence[float]) -> list[int]:
    """The squared rates in a common unit, as integers: sums of floats would not be exact."""
    ratios = [float(rate).as_integer_ratio() for rate in rates]
    unit = max(denominator for _, denominator in ratios)  # all are powers of two
    return [(numerator * (unit // denominator)) ** 2 for numerator, denominator in ratios]
