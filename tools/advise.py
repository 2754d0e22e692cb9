#!/usr/bin/env python
"""Say of a finished run whether averaging, EMA, LAWA, a longer run or a lower rate would have paid.

Examples:
  a plain run          %(prog)s RUN_DIR --dataset voc_2007_val
  a run of IMWA        %(prog)s RUN_DIR

Of a run of one member the last models and the mean of its last snapshots (LAWA) are evaluated on
--dataset, which should be a validation set: by the test set nothing should be chosen. Snapshots are
the checkpoints that SOLVER.CHECKPOINT_KEEP keeps at ends of IMWA.EPISODES and at every
SOLVER.CHECKPOINT_PERIOD, or those of CLS.SNAPSHOT_PERIOD; of a run without any the mean that
IMWA.LAWA wrote is taken. The trend is that of the run's own evaluations (TEST.EVAL_PERIOD). Of a
run of several members it prints what IMWA.ADVISE found at each average.
docs/when_averaging_helps.md explains the answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.analysis.hindsight import RunNumbers, advice, answers
from ssod_imwa.cli import add_import_option, run_main
from ssod_imwa.data.registration import import_modules
from ssod_imwa.errors import UserError
from ssod_imwa.runs.advice import advice_lines
from ssod_imwa.runs.results import Results, read_results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="OUTPUT_DIR of the run")
    parser.add_argument(
        "--dataset", metavar="NAME", help="what to measure on (DATASETS.TEST, with a warning)"
    )
    parser.add_argument(
        "--training-set",
        metavar="NAME",
        help="labeled training images, or some of them: a run that fits them hardly better than "
        "--dataset is too short, which evaluations do not tell where the rate falls; one that fits "
        "them far better is not sent on to more steps",
    )
    parser.add_argument(
        "--last", type=int, default=5, metavar="K", help="snapshots in the mean, at most (5)"
    )
    parser.add_argument(
        "--bn-batches",
        type=int,
        default=0,
        metavar="N",
        help="training batches on which the mean's batch norms are re-estimated (0: their mean)",
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="in percent (AP in detection, top1 of classifiers)"
    )
    add_import_option(parser)
    arguments = parser.parse_args()
    if arguments.last < 1:
        parser.error(f"--last {arguments.last} is not allowed (must be at least 1)")
    if arguments.bn_batches < 0:
        parser.error(f"--bn-batches {arguments.bn_batches} is not allowed (must be at least 0)")
    return arguments


def main() -> None:
    """Read what kind of run it is, and answer."""
    arguments = parse_arguments()
    modules = [name for name in arguments.modules if not name.endswith(".py")]
    import_modules(modules, option="--import")
    results = read_results(arguments.run_dir)
    print(f"{arguments.run_dir}: {results.method} on {results.dataset}, T = {results.iterations}")
    if results.members > 1:
        if arguments.dataset or arguments.training_set or arguments.metric:
            print("nothing is measured afterwards of several members: these lines are of training")
        show_averages(arguments.run_dir, results)
    else:
        judge(arguments)


def judge(arguments: argparse.Namespace) -> None:
    """Measure a run of one member, and answer."""
    # After what silences the warnings of libraries that these import.
    from ssod_imwa.analysis.snapshots import measure_run
    from ssod_imwa.runs.trained import read_trained

    trained = read_trained(arguments.run_dir)
    tests = trained.config.DATASETS.TEST
    dataset = arguments.dataset or tests[0]
    if dataset in tests:
        print(
            f"warning: {dataset} is of the run's DATASETS.TEST: nothing should be chosen by it "
            "(name a validation set with --dataset)"
        )
    numbers = measure_run(
        trained,
        dataset=dataset,
        count=arguments.last,
        bn_batches=arguments.bn_batches,
        metric=arguments.metric,
        training_set=arguments.training_set,
        asked=arguments.modules,
    )
    print(f"{numbers.metric} on {dataset}: {figures(numbers)}")
    for answer in (*answers(numbers), advice(numbers)):
        print(answer.line())


def show_averages(run_dir: Path, results: Results) -> None:
    """What was said of each average."""
    from ssod_imwa.visualization.plots import read_metrics

    lines = advice_lines(read_metrics(run_dir / "metrics.json"))
    if not lines:
        is_asked = results.imwa.get("advise")
        why = "and no average of two that were finite" if is_asked else "without IMWA.ADVISE"
        raise UserError(
            f"{run_dir} is a run of {results.members} members {why} (only runs of one member are "
            "judged afterwards)"
        )
    for episode, line in lines.items():
        print(f"average of episode {results.episode_number(episode)}: {line}")


def figures(numbers: RunNumbers) -> str:
    """The measured ones, in words."""
    words = [f"student {numbers.student:.2f}"]
    if numbers.teacher is not None:
        words.append(f"teacher {numbers.teacher:.2f}")
    if numbers.lawa is not None:
        words.append(f"mean of the last {numbers.snapshots} students {numbers.lawa:.2f}")
    return ", ".join(words)


if __name__ == "__main__":
    run_main(main)
