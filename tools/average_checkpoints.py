#!/usr/bin/env python
"""Average the models of finished runs into one ("model soup").

Examples:
  equal weights           %(prog)s RUN_DIR RUN_DIR RUN_DIR --output soup.pth
  given weights           %(prog)s RUN_DIR RUN_DIR --rule fixed --weights 0.3 0.7 --output soup.pth
  only models that help   %(prog)s RUN_DIR RUN_DIR --rule greedy --dataset voc_2007_val ...
  best point between two  %(prog)s RUN_DIR RUN_DIR --rule line --dataset voc_2007_val ...

Models average well if they began with the same weights: runs with one SEED and different
IMWA.FIRST_MEMBER, or one run's checkpoints. Greedy and line measure --metric on --dataset, which
should not be the test set. The result is a file like model_final.pth: evaluate it with
train_net.py --eval-only MODEL.WEIGHTS soup.pth, export it with export.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ssod_imwa.averaging.soups import fixed, greedy, line, uniform
from ssod_imwa.averaging.weights import average
from ssod_imwa.cli import add_import_option, require_absent, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.engine.device import pick_device
from ssod_imwa.errors import UserError
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.trained import TrainedModels, read_trained

RULES = ("uniform", "fixed", "greedy", "line")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RUN_DIR|FILE", help="finished runs, or their model files"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--rule", choices=RULES, default="uniform", help="(uniform)")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="for --rule fixed: one a model, sum 1"
    )
    parser.add_argument("--dataset", metavar="NAME", help="for greedy and line: what to measure on")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="for greedy and line (AP in detection, top1 of classifiers)",
    )
    add_import_option(parser)
    arguments = parser.parse_args()
    if (arguments.rule == "fixed") != (arguments.weights is not None):
        parser.error("--rule fixed and --weights belong together; give both or neither")
    if (arguments.rule in ("greedy", "line")) != (arguments.dataset is not None):
        parser.error("--rule greedy or line and --dataset belong together; give both or neither")
    return arguments


def coefficients_of(arguments: argparse.Namespace, soups: Sequence[TrainedModels]) -> list[float]:
    """One coefficient for each file, by the rule, from the models that are shipped."""
    states = [soup.weights for soup in soups]
    try:
        if arguments.rule == "uniform":
            return uniform(states)
        if arguments.rule == "fixed":
            return fixed(states, coefficients=arguments.weights)
        rule = greedy if arguments.rule == "greedy" else line
        return rule(states, metric=build_metric(soups[0], arguments.dataset, arguments.metric))
    except ValueError as error:
        raise UserError(f"--rule {arguments.rule}: {error}") from error


def build_metric(
    trained: TrainedModels, dataset: str, name: str | None
) -> Callable[[Mapping[str, torch.Tensor]], float]:
    """A function from weights to a metric in percent; it prints what it finds."""
    cfg = trained.config.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = [dataset]
    name = name or ("AP" if cfg.TASK == "detection" else "top1")
    task = open_task(cfg)
    model = task.load_model(str(trained.path)).to(pick_device(cfg.MODEL.DEVICE)).eval()
    evaluate = task.build_evaluator()

    def metric(weights: Mapping[str, torch.Tensor]) -> float:
        model.load_state_dict(weights)
        metrics = evaluate(model)
        if name not in metrics:
            raise UserError(f"--metric {name} is not allowed (must be one of {', '.join(metrics)})")
        print(f"{name} {metrics[name]:.2f}")
        return metrics[name]

    return metric


def main() -> None:
    """Read, average, write."""
    arguments = parse_arguments()
    import_modules(arguments.modules, option="--import")
    require_absent(arguments.output)
    soups = [read_trained(source) for source in arguments.sources]
    first = soups[0]
    coefficients = coefficients_of(arguments, soups)
    content = dict(first.content)
    try:
        for name in first.models:
            states = [soup.models.get(name, {}) for soup in soups]
            content[name] = average(states, coefficients=coefficients)
    except ValueError as error:
        raise UserError(f"these models cannot be averaged: {error}") from error
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.output, content)
    for soup, coefficient in zip(soups, coefficients, strict=True):
        print(f"{coefficient:.4f} {soup.path}")
    print(f"{arguments.output}: {' and '.join(first.models)} of {len(soups)} models")


if __name__ == "__main__":
    run_main(main)
