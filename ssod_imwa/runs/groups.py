"""Finished runs that differ in nothing but the seed, and how groups of them compare."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssod_imwa.config.averaging import IMWAOptions, StoreOptions
from ssod_imwa.config.options import options_of
from ssod_imwa.runs.results import Model, Results, ResultsError


@dataclass(frozen=True)
class Spread:
    """A figure over several runs.

    Attributes:
        mean: of the runs in which it is defined, NaN if there is none.
        std: their sample standard deviation (n - 1), NaN for fewer than two.
        count: n.
    """

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize values, leaving NaN out.

        Example:
            >>> Spread.of([1.0, 3.0, float("nan")])
            Spread(mean=2.0, std=1.4142135623730951, count=2)
        """
        defined = [value for value in values if not math.isnan(value)]
        return cls(
            statistics.fmean(defined) if defined else math.nan,
            statistics.stdev(defined) if len(defined) > 1 else math.nan,
            len(defined),
        )

    @property
    def error(self) -> float:
        """Standard error of the mean, std / sqrt(n); NaN for fewer than two runs.

        Example:
            >>> Spread.of([1.0, 3.0]).error
            1.0
        """
        return self.std / math.sqrt(self.count) if self.count else math.nan


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed (and fold).

    Attributes:
        runs: at least one.
        names: of their folders, or nothing.
    """

    runs: tuple[Results, ...]
    names: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        return self.runs[0].dataset

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def imwa(self) -> dict[str, Any]:
        return self.runs[0].imwa

    @property
    def iterations(self) -> int:
        return self.runs[0].iterations

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    def spread(self, metric: str, *, model: Model | None = None) -> Spread:
        """Mean and spread of a headline figure over the runs; NaN where a run lacks it."""
        return Spread.of(run.headline(model).metrics.get(metric, math.nan) for run in self.runs)

    def gain(self, metric: str, baseline: Group, *, model: Model | None = None) -> Spread:
        """Mean and spread of the differences to the baseline's runs of the same seed and fold."""
        others = {_draw(run): run for run in baseline.runs}
        return Spread.of(
            run.headline(model).metrics.get(metric, math.nan)
            - others[_draw(run)].headline(model).metrics.get(metric, math.nan)
            for run in self.runs
            if _draw(run) in others
        )


def group_runs(
    runs: Sequence[Results],
    *,
    names: Sequence[str] | None = None,
    settings: Sequence[Mapping[str, Any] | None] | None = None,
) -> list[Group]:
    """Sort runs into groups of equal task, data set, method, T and IMWA settings, in first order.

    Args:
        runs: finished runs, each once.
        names: of the runs' folders. Runs of a group with equal seeds are then told apart by name,
            each in a group of its own: they differ in something that results do not say.
        settings: of each run what else its figures depend on, None if not known; runs with other
            settings are in another group. Ignored in a group that has a run without them.

    Raises:
        ResultsError: a group holds the same seed (and fold, and first member) twice, which would
            make the spread look smaller than it is, and there are no names.
    """
    groups = []
    for alike in _alike(runs, settings):
        repeated = _repeated([runs[i] for i in alike])
        if repeated is not None and names is None:
            raise ResultsError(
                f"seed {repeated.seed} of {repeated.method} on {repeated.dataset} with "
                f"{repeated.imwa['members']} members, {repeated.imwa['episodes']} episodes and "
                f"T = {repeated.iterations} is given twice (give each run once)"
            )
        for chosen in [alike] if repeated is None else [[i] for i in alike]:
            folders = () if names is None else tuple(names[i] for i in chosen)
            groups.append(Group(tuple(runs[i] for i in chosen), folders))
    return groups


def _alike(
    runs: Sequence[Results], settings: Sequence[Mapping[str, Any] | None] | None
) -> Iterator[list[int]]:
    """Positions of runs between which no setting differs."""
    for same in _split(range(len(runs)), [_recipe(run) for run in runs]):
        if settings is None or any(settings[i] is None for i in same):
            yield same
        else:
            yield from _split(same, settings)


def _split(positions: Iterable[int], keys: Sequence[Any]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i in positions:
        groups.setdefault(json.dumps(keys[i], sort_keys=True), []).append(i)
    return list(groups.values())


# What changes no average: which members these are, whether they were trained at once, what is free.
CHANGES_NO_AVERAGE = {
    "first_member",
    "parallel",
    *(name.lower() for name, item in options_of(IMWAOptions).items() if item.free),
}
_DEFAULTS = {
    name.lower(): item.default
    for options in (IMWAOptions, StoreOptions)
    for name, item in options_of(options).items()
}


def _recipe(run: Results) -> list[Any]:
    settings = {
        key: value
        for key, value in run.imwa.items()
        # Runs of versions without a key are those of its default.
        if key not in CHANGES_NO_AVERAGE and value != _DEFAULTS.get(key)
    }
    changes_at_ends = run.takes_outer_steps or run.imwa.get("optimizer_state") == "reset"
    if run.members == 1 and not changes_at_ends:
        settings = {"members": 1}  # nothing is averaged, so how and when makes no difference
    return [run.task, run.dataset, run.method, run.iterations, settings]


def _repeated(runs: Sequence[Results]) -> Results | None:
    """The first run that drew what one before it drew."""
    for i, run in enumerate(runs):
        if any(_draw(run) == _draw(other) for other in runs[:i]):
            return run
    return None


def _draw(run: Results) -> tuple[Any, ...]:
    """What a run drew: runs that share it are the same run."""
    return run.seed, run.fold, run.imwa.get("first_member", 0)
