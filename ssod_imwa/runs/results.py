"""`results.json`: what a finished run measured."""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ssod_imwa.config.averaging import common_iterations
from ssod_imwa.engine.checkpoint import atomic
from ssod_imwa.errors import UserError

FILE_NAME = "results.json"
SUMMARY = "summary"  # key of what `Results.summary` says, for readers of the file
# Semi-supervised work reports the median of the last 20 evaluations of a run.
LAST_EVALUATIONS = 20
LOWER_IS_BETTER = ("ece", "reconstruction_error", "zero_recall_classes")
STAGES = ("running", "member", "average", "final", "lawa")
_PACKAGES = ("ssod_imwa", "torch", "torchvision", "numpy", "faster-coco-eval")

_TO_THE_MEAN = {"outer.lr": 1.0, "outer.momentum": 0.0}
_OPTIONAL = {"fold", "global_step", "t", "class_counts", "burn_in", "episode_lengths"}
_KINDS = {
    "dataset": str,
    "method": str,
    "imwa": dict,
    "seed": int,
    "iterations": int,
    "evaluations": list,
}

Model = Literal["student", "teacher"]
MODELS: tuple[Model, ...] = ("student", "teacher")
Stage = Literal["running", "member", "average", "final", "lawa"]


class ResultsError(UserError):
    """A results file is missing, damaged or of another kind, or cannot be compared."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures, as installed."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is on the path, not installed
            installed[package] = getattr(sys.modules.get(package), "__version__", "not installed")
    return installed


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model at one moment of a run.

    Attributes:
        model: "student" or "teacher".
        stage: "running" inside an episode, "member" before it is averaged, "average" at the end of
            an episode, "final" at that of the run, "lawa" of the mean of the last averages.
        episode: from 0; the common part, if there is one, is 0.
        member: from 0; None for averages.
        metrics: percent; NaN where the data set has nothing to measure (null in the file).
        global_step: step of the run after which it was made.
        t: the member's own iteration after which it was made.
    """

    model: Model
    stage: Stage
    episode: int
    member: int | None
    metrics: dict[str, float]
    global_step: int | None = None
    t: int | None = None


@dataclass(frozen=True)
class Results:
    """A run in figures.

    Attributes:
        task: "detection" or "classification".
        dataset: what was trained and tested on, in words, without the fold ("voc_2007_trainval").
        method: "supervised", "unbiased_teacher", ...
        imwa: settings of the averaging by lower-case name; `members` and `episodes` at least.
        seed: of the run.
        iterations: T, optimizer steps of one member.
        wall_time: seconds, interruptions left out.
        peak_memory: bytes, see `engine.writers.peak_memory`.
        evaluations: in the order in which they were made.
        fold: of the labeled images.
        class_counts: labeled objects (of a classifier, images) of each class that it learned from.
        burn_in: B, own iterations of a member in which it learned labeled images alone.
        episode_lengths: own iterations of the episodes of several members if they are not alike.
        versions: of Python and the packages that decide the figures.
    """

    task: str
    dataset: str
    method: str
    imwa: dict[str, Any]
    seed: int
    iterations: int
    wall_time: float
    peak_memory: int
    evaluations: tuple[Evaluation, ...]
    fold: int | None = None
    class_counts: dict[str, int] = field(default_factory=dict)
    burn_in: int = 0
    episode_lengths: tuple[int, ...] = ()
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def common_iterations(self) -> int:
        """S, own iterations that one member trains before members part, 0..T."""
        return common_iterations(self.imwa.get("start", 0.0), self.iterations)

    @property
    def members(self) -> int:
        """M, 1 if members never part."""
        return 1 if self.common_iterations == self.iterations else int(self.imwa["members"])

    @property
    def takes_outer_steps(self) -> bool:
        """Whether the student does not simply go to the average (IMWA.OUTER)."""
        return any(self.imwa.get(key, x) != x for key, x in _TO_THE_MEAN.items())

    @property
    def global_steps(self) -> int:
        """Optimizer steps of all members."""
        return self.common_iterations + self.members * (self.iterations - self.common_iterations)

    def episode_number(self, episode: int) -> int:
        """What people call an episode: counted from 1, the common part is 0."""
        return episode + (0 if 0 < self.common_iterations < self.iterations else 1)

    def is_of_one(self, evaluation: Evaluation) -> bool:
        """Whether it is of an episode with one member, who is its own average."""
        t = evaluation.t
        return self.members == 1 or (t is not None and t < self.common_iterations)

    @property
    def averages(self) -> tuple[Evaluation, ...]:
        """The evaluations of averages at their ends of episodes."""
        return tuple(x for x in self.evaluations if x.stage in ("average", "final"))

    def headline(self, model: Model | None = None) -> Evaluation:
        """The last evaluation of the averages: the teacher's if there is one, or `model`'s.

        Raises:
            ResultsError: there is none.
        """
        for wanted in [model] if model else reversed(MODELS):
            evaluations = [x for x in self.averages if x.model == wanted]
            if evaluations:
                return evaluations[-1]
        raise ResultsError(
            f"results of seed {self.seed} on {self.dataset} hold no evaluation of "
            f"{'the ' + model if model else 'an average'} (the run did not reach one)"
        )

    def series(self, model: Model) -> list[Evaluation]:
        """The evaluations that a run's course is judged by, in order.

        Of one member all of its own, of several those of their averages.
        """
        return [
            x
            for x in self.evaluations
            if x.model == model
            and (x.stage in ("average", "final") or (x.stage == "running" and self.is_of_one(x)))
        ]

    def of_lawa(self, model: Model) -> list[Evaluation]:
        """The evaluations of the mean of the last averages: one, or none."""
        return [x for x in self.evaluations if x.stage == "lawa" and x.model == model]

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """For each model and metric: final, best, median and mean of the last evaluations, LAWA.

        The final one is the headline. The best of many evaluations on test images is chosen on
        them, so it says more than a run without labels for them could reach.
        """
        result: dict[str, dict[str, dict[str, float]]] = {}
        for model in MODELS:
            series = self.series(model)
            for metric in dict.fromkeys(name for x in series for name in x.metrics):
                values = [x.metrics.get(metric, math.nan) for x in series]
                final = [v for x, v in zip(series, values, strict=True) if x.stage == "final"]
                course = _course(values, metric, final=final)
                lawa = [x.metrics.get(metric, math.nan) for x in self.of_lawa(model)]
                result.setdefault(model, {})[metric] = course | ({"lawa": lawa[-1]} if lawa else {})
        return result


def _course(values: Sequence[float], metric: str, *, final: Sequence[float]) -> dict[str, float]:
    defined = [value for value in values if not math.isnan(value)]
    last = [value for value in values[-LAST_EVALUATIONS:] if not math.isnan(value)]
    best = min if metric.rpartition("/")[2] in LOWER_IS_BETTER else max
    return {
        "final": final[-1] if final else math.nan,
        "best": best(defined, default=math.nan),
        f"median_of_last_{LAST_EVALUATIONS}": statistics.median(last) if last else math.nan,
        f"mean_of_last_{LAST_EVALUATIONS}": statistics.fmean(last) if last else math.nan,
    }


def write_results(path: str | Path, results: Results) -> None:
    """Write a run's results as strict JSON (NaN as null); the file is complete or not there.

    Raises:
        ValueError: a figure is infinite.
        OSError: the file cannot be written.
    """
    content = {**asdict(results), SUMMARY: results.summary()}
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    atomic.write_text(Path(path), text + "\n", kind="results")


def read_results(path: str | Path) -> Results:
    """Read the results of a run, given its directory or the file.

    Raises:
        ResultsError: the file is missing or is not what `write_results` writes.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(
            f"{path} does not exist (a run writes it when it ends; give its OUTPUT_DIR)"
        ) from None
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    try:
        return _parse(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{path} is not a results file: {error}") from error


def _parse(values: Any) -> Results:
    if not isinstance(values, dict):
        raise TypeError(f"it holds a {type(values).__name__} (must be an object)")
    values = {key: value for key, value in values.items() if key != SUMMARY}
    _check_keys(values, Results, "")
    for key, kind in _KINDS.items():
        if not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise TypeError(f"{key} = {values[key]!r} is not allowed (must be {kind.__name__})")
    evaluations = []
    for i, item in enumerate(values["evaluations"]):
        _check_keys(item, Evaluation, f"evaluations[{i}].")
        for key, allowed in (("model", MODELS), ("stage", STAGES)):
            if item[key] not in allowed:
                raise ValueError(f"evaluations[{i}].{key} = {item[key]!r} is not one of {allowed}")
        metrics = {k: math.nan if v is None else float(v) for k, v in item["metrics"].items()}
        evaluations.append(replace(Evaluation(**item), metrics=metrics))
    for key in ("members", "episodes"):
        if not isinstance(values["imwa"].get(key), int):
            raise ValueError(
                f"imwa.{key} = {values['imwa'].get(key)!r} is not allowed (must be int)"
            )
    lengths = tuple(values.get("episode_lengths", ()))
    return Results(**{**values, "evaluations": tuple(evaluations), "episode_lengths": lengths})


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    if not isinstance(values, dict):
        raise TypeError(f"{where.rstrip('.')} is not an object")
    names = {item.name for item in fields(kind)}
    for key in sorted(names - _OPTIONAL - values.keys()):
        raise ValueError(f"{where}{key} is missing")
    for key in sorted(values.keys() - names):
        raise ValueError(f"{where}{key} is unknown")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


MAIN_METRICS = (
    *("AP", "AP50"),  # detection, by COCO and by VOC
    *("top1", "many", "medium", "few", "h_mean", "g_mean", "lowest_recall"),  # classification
    "reconstruction_error",
)


def main_metrics(runs: Iterable[Results]) -> list[str]:
    """Names of the figures to show first, those of each data set."""
    return main_metrics_of(x for run in runs for x in run.evaluations)


def main_metrics_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Likewise, of evaluations."""
    names = dict.fromkeys(name for x in evaluations for name in x.metrics)
    of_experts = ("expert", "experts")
    return [
        name
        for name in names
        if name.rpartition("/")[2] in MAIN_METRICS and not name.startswith(of_experts)
    ]
