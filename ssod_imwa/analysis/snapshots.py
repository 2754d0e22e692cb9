"""What a finished run of one member left behind: its last models, and figures of their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssod_imwa.analysis.hindsight import RunNumbers, trend
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.weights import average
from ssod_imwa.classification.tracking import SNAPSHOT_FOLDER, snapshot_files
from ssod_imwa.engine.checkpoint.atomic import load_checkpoint
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.checkpoint.output import LAWA, resume_files
from ssod_imwa.engine.device import pick_device
from ssod_imwa.errors import UserError
from ssod_imwa.runs.results import LOWER_IS_BETTER, Results, read_results
from ssod_imwa.runs.soups import main_metric, open_model
from ssod_imwa.runs.trained import TrainedModels
from ssod_imwa.visualization.plots import read_metrics

State = Mapping[str, torch.Tensor]


def last_students(run_dir: str | Path, count: int) -> list[State]:
    """The student's weights at the end of a run and before, newest first, at most so many.

    Of resume files (SOLVER.CHECKPOINT_KEEP) or, if there are more of them, of
    CLS.SNAPSHOT_PERIOD's snapshots. What stands in both is taken once.
    """
    final: State = read_models(run_dir).models["student"]
    resumable = list(resume_files(run_dir).values())
    snapshots = list(snapshot_files(Path(run_dir) / SNAPSHOT_FOLDER).values())[::-1]
    students: list[State] = [final]
    for path in snapshots if len(snapshots) > len(resumable) else resumable:
        if len(students) == count:
            break
        content = load_checkpoint(path)
        student = content["student"] if "student" in content else _models(content)["student"]
        if not _equal(student, students[-1]):
            students.append(student)
    return students


def _models(content: Mapping[str, Any]) -> Mapping[str, State]:
    return content["trainer"]["models"]  # type: ignore[no-any-return]  # see `Trainer.state_dict`


def _equal(first: State, second: State) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def measure_run(
    trained: TrainedModels,
    *,
    dataset: str,
    count: int = 5,
    bn_batches: int = 0,
    metric: str | None = None,
    training_set: str | None = None,
    asked: Sequence[str] = (),
) -> RunNumbers:
    """Evaluate a finished run's last models and their mean.

    Args:
        trained: its final model, beside which everything else lies.
        dataset: what is measured on.
        count: of snapshots in the mean, at most; at least 1. Of a run that kept none but the last,
            and has IMWA.LAWA, its mean is taken.
        bn_batches: on which the mean's batch norms are re-estimated; 0 takes the mean of theirs.
        metric: its name; None takes AP in detection and top1 of classifiers.
        training_set: what the run was trained on, or a part of it, to tell whether it is learned;
            None does without.
        asked: modules that are imported and LazyConfigs that may be read.

    Raises:
        UserError: something cannot be read or measured, or less of the metric is better.
    """
    folder = trained.path.parent
    results = read_results(folder)
    students = last_students(folder, count)
    task, model = open_model(trained, dataset, asked=asked)
    evaluate = task.build_evaluator()
    name = metric or main_metric(task)
    if name.rpartition("/")[2] in LOWER_IS_BETTER:
        raise UserError(f"--metric {name} is not allowed (must be one of which more is better)")

    def figure(weights: State, *, recompute: bool = False) -> float:
        model.load_state_dict(weights)
        if recompute:
            device = pick_device(task.cfg.MODEL.DEVICE)
            schedule = EpisodeSchedule(task.cfg.SOLVER.MAX_ITER)
            batches = task.build_batches(schedule, device, task.build_method(device).reads)
            steps = min(bn_batches, len(schedule))
            task.build_bn_recomputation(batches, count=steps)({"model": model})
        return measured_figure(evaluate(model), name, dataset)

    teacher = trained.models.get("teacher")
    lawa, snapshots = average(students) if len(students) > 1 else None, len(students)
    if lawa is None and (folder / LAWA).exists():
        lawa, snapshots = read_models(folder / LAWA).models["student"], trained.config.IMWA.LAWA
    course = course_of(results, name)
    training = None
    if training_set is not None:
        of_training, model = open_model(trained, training_set, asked=asked)
        training = measured_figure(of_training.build_evaluator()(model), name, training_set)
    return RunNumbers(
        metric=name,
        student=figure(students[0]),
        teacher=None if teacher is None else figure(teacher),
        lawa=None if lawa is None else figure(lawa, recompute=bn_batches > 0),
        snapshots=snapshots,
        rate=last_rate(folder),
        trend=trend(course, results.iterations),
        training=training,
    )


def course_of(results: Results, metric: str) -> list[tuple[float, float]]:
    """The run's own evaluations of its shipped model, as (iterations done, figure).

    Of several test sets the first counts. Empty if none of them has the metric.
    """
    series = results.series(results.headline().model)
    of_sets = [name for name in series[-1].metrics if name.rpartition("/")[2] == metric]
    name = next(iter(of_sets), metric)
    return [(x.t + 1, x.metrics[name]) for x in series if x.t is not None and name in x.metrics]


def measured_figure(metrics: Mapping[str, float], name: str, dataset: str) -> float:
    """A metric of those that were measured on a data set.

    Raises:
        UserError: it is not among them, or is NaN.

    Example:
        >>> measured_figure({"AP": 40.5}, "AP", "pets_val")
        40.5
    """
    if name not in metrics:
        raise UserError(f"--metric {name} is not allowed (must be one of {', '.join(metrics)})")
    if math.isnan(metrics[name]):
        raise UserError(
            f"{name} could not be measured on {dataset}, which has nothing to measure it by (take "
            "another data set or --metric)"
        )
    return metrics[name]


def last_rate(run_dir: str | Path) -> float:
    """The last learning rate in a run's metrics.json as a share of the highest.

    Raises:
        UserError: the file is not there or holds no rate.
    """
    path = Path(run_dir) / "metrics.json"
    rows = read_metrics(path)
    rates = [row["lr"] for row in rows if row.get("lr") is not None]
    if not rates or max(rates) <= 0:
        raise UserError(f"{path} holds no learning rate above 0 (did the run train?)")
    return float(rates[-1] / max(rates))
