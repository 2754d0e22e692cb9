"""Coefficients for averaging finished models ("model soups").

Every rule takes the models' states first and returns one coefficient per model, for `average` or,
with its options bound by `functools.partial`, for the `coefficients` of `IMWA`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ssod_imwa.averaging.checks import check_coefficients
from ssod_imwa.averaging.weights import State, average, copy_, named_state, snapshot

States = Sequence[Mapping[str, Tensor]]
Metric = Callable[[Mapping[str, Tensor]], float]


def uniform(states: States) -> list[float]:
    """1/M for each of M models.

    Example:
        >>> uniform([{}, {}])
        [0.5, 0.5]
    """
    if not states:
        raise ValueError("no model to average (give at least one)")
    return [1 / len(states)] * len(states)


def fixed(states: States, *, coefficients: Sequence[float]) -> list[float]:
    """The given coefficients, checked: one per model, none negative, with the sum 1."""
    return check_coefficients(coefficients, len(states))


def greedy(
    states: States, *, metric: Metric, keep_ties: bool = True, accumulate: str = "float64"
) -> list[float]:
    """Equal coefficients for the models that help, zero for the others.

    Models are sorted by their metric; starting from the best, the next one joins unless the metric
    of the mean would fall ("Model soups", arXiv 2203.05482, recipe 1). At most 2M - 1 evaluations.

    Args:
        states: the models.
        metric: quality of a model with these weights, larger is better.
        keep_ties: whether a model joins that leaves the metric as it is; the published code says
            no, the paper says yes.
        accumulate: see `average`.

    Raises:
        ValueError: the metric is NaN.

    Example:
        >>> import torch
        >>> models = [{"w": torch.tensor(value)} for value in (0.0, 3.0, 8.0)]
        >>> greedy(models, metric=lambda state: -abs(float(state["w"]) - 2))
        [0.5, 0.5, 0.0]
    """
    uniform(states)
    values = [_evaluated(metric, state) for state in states]
    best, *others = sorted(range(len(states)), key=values.__getitem__, reverse=True)
    chosen, quality = [best], values[best]
    for member in others:
        candidate = average([states[i] for i in sorted([*chosen, member])], accumulate=accumulate)
        value = _evaluated(metric, candidate)
        if value > quality or (keep_ties and value == quality):
            chosen.append(member)
            quality = value
    return [1 / len(chosen) if member in chosen else 0.0 for member in range(len(states))]


def proportional(states: States, *, metric: Metric) -> list[float]:
    """Coefficients in proportion to each model's metric (BTM's adaptive merging).

    Args:
        states: the models.
        metric: quality of a model with these weights, at least 0, larger is better.

    Raises:
        ValueError: a metric is NaN or below 0, or all are 0.

    Example:
        >>> import torch
        >>> models = [{"w": torch.tensor(value)} for value in (1.0, 3.0)]
        >>> proportional(models, metric=lambda state: float(state["w"]))
        [0.25, 0.75]
    """
    uniform(states)
    values = [_evaluated(metric, state) for state in states]
    if min(values) < 0 or sum(values) == 0:
        raise ValueError(f"metrics {values} are not allowed (must be at least 0, and one above)")
    return [value / sum(values) for value in values]


def line(
    states: States,
    *,
    metric: Metric,
    grid: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    accumulate: str = "float64",
) -> list[float]:
    """The best point on the line between two models; on a tie the one nearest the middle.

    Args:
        states: two models.
        metric: quality of a model with these weights, larger is better; called once per point.
        grid: coefficients of the second model, each in 0..1.
        accumulate: see `average`.

    Raises:
        ValueError: there are not two models, the grid is empty or out of range, the metric is NaN.

    Example:
        >>> import torch
        >>> models = [{"w": torch.tensor(value)} for value in (0.0, 4.0)]
        >>> line(models, metric=lambda state: -abs(float(state["w"]) - 1))
        [0.75, 0.25]
    """
    if len(states) != 2:
        raise ValueError(f"line is for 2 models, there are {len(states)} (use greedy)")
    if not grid or not all(0 <= alpha <= 1 for alpha in grid):
        raise ValueError(f"grid = {list(grid)} is not allowed (must hold values in 0..1)")
    points = [[1 - alpha, float(alpha)] for alpha in grid]
    values = [
        _evaluated(metric, average(states, coefficients=point, accumulate=accumulate))
        for point in points
    ]
    best = max(range(len(points)), key=lambda i: (values[i], -abs(points[i][1] - 0.5)))
    return points[best]


def metric_of(modules: Mapping[str, nn.Module], evaluate: Callable[[], float]) -> Metric:
    """A metric of weights: `evaluate()` is called while the modules hold them.

    Afterwards the modules hold their own weights again, also if `evaluate` fails.

    Args:
        modules: as given to `IMWA`; the weights' names begin with the names of the modules.
        evaluate: quality of the modules, larger is better.
    """

    def metric(state: Mapping[str, Tensor]) -> float:
        live: State = {n: t for n, t in named_state(modules).items() if n in state}
        own = snapshot(live)
        try:
            copy_(live, state)
            return float(evaluate())
        finally:
            copy_(live, own)

    return metric


def _evaluated(metric: Metric, state: Mapping[str, Tensor]) -> float:
    value = float(metric(state))
    if math.isnan(value):
        raise ValueError("the metric of a model is NaN; a rule cannot compare it with others")
    return value
