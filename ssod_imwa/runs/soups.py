"""Finished runs' models averaged into one ("model soup"), weighed by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ssod_imwa.averaging import soups
from ssod_imwa.averaging.weights import average
from ssod_imwa.engine.checkpoint.atomic import make_room, write_checkpoint
from ssod_imwa.engine.checkpoint.models import ModelFile
from ssod_imwa.engine.device import pick_device
from ssod_imwa.errors import UserError
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import (
    LOWER_IS_BETTER,
    MAIN_METRICS,
    MODELS,
    Model,
    ResultsError,
    read_results,
)
from ssod_imwa.runs.trained import TrainedModels
from ssod_imwa.task import Task

RULES = ("uniform", "fixed", "greedy", "line")
MEASURING = ("greedy", "line")
"""Rules that need a metric."""

Metric = Callable[[Mapping[str, torch.Tensor]], float]


def choose_coefficients(
    files: Sequence[ModelFile],
    rule: str,
    *,
    weights: Sequence[float] | None = None,
    metric: Metric | None = None,
) -> list[float]:
    """One coefficient for each file, from the models that are shipped.

    Args:
        files: of finished runs.
        rule: one of `RULES`.
        weights: for "fixed", one a file, with the sum 1.
        metric: for "greedy" and "line", of weights; larger is better.

    Raises:
        UserError: the models do not fit each other, or the weights the models.
        ValueError: the rule needs what is missing, or does not need what is there.
    """
    if (rule == "fixed") != (weights is not None) or (rule in MEASURING) != (metric is not None):
        raise ValueError(f"rule = {rule!r} takes weights if fixed, a metric if one of {MEASURING}")
    check_same_models(files)
    states = [file.weights for file in files]
    try:
        if weights is not None:
            return soups.fixed(states, coefficients=weights)
        if metric is None:
            return soups.uniform(states)
        return (soups.greedy if rule == "greedy" else soups.line)(states, metric=metric)
    except ValueError as error:
        raise UserError(f"--rule {rule}: {error}") from error


def check_same_models(files: Sequence[ModelFile]) -> None:
    """Refuse files of which some lack a model, ship another one or know other classes.

    Raises:
        UserError: says which models two such files have, with their results where these are known.
    """
    first = files[0]
    for file in files[1:]:
        if (file.models.keys(), file.inference_model) != (
            first.models.keys(),
            first.inference_model,
        ):
            raise UserError(
                f"{_models_in(first)}, but {_models_in(file)}: these cannot be averaged into one "
                "(take runs that have and ship the same models)"
            )
        if file.content.get("classes", []) != first.content.get("classes", []):
            raise UserError(
                f"{first.path} and {file.path} were trained on other classes, or in another order "
                "(take runs of the same)"
            )


def _models_in(file: ModelFile) -> str:
    models = " and ".join(f"{name}{_figure(file, name)}" for name in MODELS if name in file.models)
    return f"{file.path} has {models} and ships the {file.inference_model}"


def _figure(file: ModelFile, model: Model) -> str:
    """The first of a model's main metrics in brackets, such as AP, if its run's results have it."""
    try:
        metrics = read_results(file.path.parent).headline(model).metrics
    except ResultsError:  # a file alone, or a run that was not evaluated
        return ""
    name = next((name for name in MAIN_METRICS if name in metrics), None)
    return f" ({name} {metrics[name]:.2f})" if name else ""


def build_metric(
    trained: TrainedModels,
    dataset: str,
    name: str | None = None,
    *,
    asked: Sequence[str] = (),
    show: Callable[[str], object] = lambda line: None,
) -> Metric:
    """A function from weights to a metric in percent.

    Args:
        trained: says which network it is, and on which data its classes are.
        dataset: what is measured on.
        name: of the metric; None takes AP in detection and top1 of classifiers.
        asked: modules that are imported and LazyConfigs that may be read; none is by itself.
        show: called with each measurement in words.

    Raises:
        UserError: the file names code that is not asked for, or less of the metric is better.
    """
    task, model = open_model(trained, dataset, asked=asked)
    name = name or main_metric(task)
    if name.rpartition("/")[2] in LOWER_IS_BETTER:
        raise UserError(f"--metric {name} is not allowed (must be one of which more is better)")
    evaluate = task.build_evaluator()

    def metric(weights: Mapping[str, torch.Tensor]) -> float:
        model.load_state_dict(weights)
        metrics = evaluate(model)
        if name not in metrics:
            raise UserError(f"--metric {name} is not allowed (must be one of {', '.join(metrics)})")
        show(f"{name} {metrics[name]:.2f}")
        return metrics[name]

    return metric


def open_model(
    trained: TrainedModels, dataset: str, *, asked: Sequence[str] = ()
) -> tuple[Task, nn.Module]:
    """The task of a finished run, tested on a data set, and its model on its device, in eval mode.

    Raises:
        UserError: the file names code that is not asked for.
    """
    trained.require_asked(asked, reads_data=True)
    cfg = trained.config.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = [dataset]
    task = open_task(cfg)
    model = task.load_model(str(trained.path)).to(pick_device(cfg.MODEL.DEVICE))
    return task, model.eval()


def main_metric(task: Task) -> str:
    """What models of a task are measured by unless somebody says otherwise."""
    return "AP" if task.name == "detection" else "top1"


def write_average(files: Sequence[ModelFile], coefficients: Sequence[float], output: Path) -> None:
    """Write a file like the first, in which students and teachers are averages.

    Raises:
        UserError: the models are of different networks, the file cannot be written, or see
            `check_same_models`.
    """
    check_same_models(files)
    first = files[0]
    content = dict(first.content)
    try:
        for name in first.models:
            states = [file.models[name] for file in files]
            content[name] = average(states, coefficients=coefficients)
    except ValueError as error:
        raise UserError(f"these models cannot be averaged: {error}") from error
    make_room(output)
    write_checkpoint(output, content)
