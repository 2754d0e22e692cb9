"""Is what tools/advise.py advises of a plain run among the best two things that could be done?

Heads on cached features of CIFAR-10-LT (docs/backbones.md) are trained on four fifths of its
training images. The advisor sees a plain run and the last fifth; the test images say what each of
six things reaches: nothing, the run's EMA, the mean of its snapshots, twice the length (with EMA),
a rate that falls to 0, IMWA. The advisor's thresholds were set on digits and, of training images
that are learned, on seeds 7 to 11 here. Judge it by others.

    python benchmarks/advice.py --data-root datasets --seeds 12 13 14 15 16
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect

# isort: split
from rich.console import Console
from rich.table import Table

from ssod_imwa.analysis.hindsight import advice
from ssod_imwa.analysis.snapshots import last_students, measure_run
from ssod_imwa.averaging.weights import average
from ssod_imwa.cli import log_to_stderr, run_main
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import train
from ssod_imwa.runs.soups import open_model
from ssod_imwa.runs.trained import TrainedModels, read_trained

CONFIGS = Path(__file__).parents[1] / "configs"
FEATURES = "features:cifar10_lt_features"
METRIC = "mean_recall"
KEPT = 5  # snapshots of a plain run
ANNEALED = "WarmupCosineLR"
TIE = 0.3  # points: a standard error of differences on 10,000 images
# What a testbed is: the length T, the decay of a plain run's EMA, and the schedule of its rate.
BEDS = {
    "saturated": (800, 0.99, "WarmupMultiStepLR"),
    "short": (100, 0.9, "WarmupMultiStepLR"),
    "annealed": (800, 0.99, ANNEALED),
    "short, annealed": (100, 0.9, ANNEALED),
}


def main() -> None:
    """Train, ask, compare, and print a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, metavar="DIR", help="of the features")
    parser.add_argument("--output", type=Path, default=Path("output/advice"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="K")
    arguments = parser.parse_args()
    log_to_stderr()
    table = Table("testbed", "seed", "advice", "among the best two", "test images say")
    right, level = [], []
    for bed in BEDS:
        for seed in arguments.seeds:
            action, reached = judge(bed, seed, arguments)
            ranking = sorted(reached, key=lambda name: -reached[name])
            right.append(action in ranking[:2])
            level.append(reached[action] > reached[ranking[1]] - TIE)
            words = ", ".join(f"{name} {reached[name]:.1f}" for name in ranking)
            table.add_row(bed, str(seed), action, "yes" if right[-1] else "no", words)
            gc.collect()
    console = Console(width=160)
    console.print(table)
    console.print(
        f"{sum(right)} of {len(right)} pieces of advice are among the best two, {sum(level)} less "
        f"than {TIE} below the second"
    )


def judge(bed: str, seed: int, arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """What the advisor says of a plain run, and what each thing to do reaches on test images."""
    length, decay, schedule = BEDS[bed]
    plain = {
        "SOLVER.MAX_ITER": length,
        "SOLVER.LR_SCHEDULER_NAME": schedule,
        "CLS.EMA_DECAY": decay,
        "TEST.EVAL_PERIOD": length // 20,
        "IMWA.EPISODES": 20,
        "SOLVER.CHECKPOINT_KEEP": KEPT,
    }
    place = arguments.output / f"{bed.replace(', ', '_')}_seed{seed}"

    def run(name: str, **changes: object) -> TrainedModels:
        settings = {
            **plain,
            **{key.replace("__", "."): value for key, value in changes.items()},
            "SEED": seed,
            "OUTPUT_DIR": place / name,
            "DATASETS.ROOT": arguments.data_root,
        }
        return trained(place / name, [str(x) for pair in settings.items() for x in pair])

    first = run("plain")
    test = Score(first)
    twice = run("twice", SOLVER__MAX_ITER=2 * length)
    reached = {
        "nothing": test(first.models["student"]),
        "EMA": test(first.models["teacher"]),
        "LAWA": test(average(last_students(first.path.parent, KEPT))),
        "longer run": test(twice.models["teacher"]),
        "IMWA": test(run("imwa", IMWA__MEMBERS=2, IMWA__EPISODES=10).models["student"]),
    }
    if schedule != ANNEALED:
        annealed = run("annealed", SOLVER__LR_SCHEDULER_NAME=ANNEALED)
        reached["lower rate"] = test(annealed.models["student"])
    numbers = measure_run(
        first,
        dataset=f"{FEATURES}/train.pt:held_out",
        training_set=f"{FEATURES}/train.pt:fit",
        metric=METRIC,
        count=KEPT,
    )
    return advice(numbers).verdict, reached


def trained(folder: Path, overrides: list[str]) -> TrainedModels:
    """The last models of a run, which is trained unless it is finished."""
    files = [CONFIGS / "cifar10_lt_features" / f"{x}.yaml" for x in ("cross_entropy", "hold_out")]
    if not (folder / FINAL).is_file() and train(load_config(files, overrides), resume_from=True):
        raise SystemExit(1)
    return read_trained(folder)


class Score:
    """Weights to the metric of test images, in percent."""

    def __init__(self, run: TrainedModels) -> None:
        task, self.model = open_model(run, f"{FEATURES}/test.pt")
        self.evaluate = task.build_evaluator()

    def __call__(self, weights) -> float:  # noqa: ANN001 - a state dict
        self.model.load_state_dict(weights)
        return self.evaluate(self.model)[METRIC]


if __name__ == "__main__":
    run_main(main)
