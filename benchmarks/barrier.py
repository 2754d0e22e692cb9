"""What lies between the two members of vanilla MWA, from a pretrained and from a random start.

For each seed and start two members of one recipe are trained apart, from the same weights, on
images in other orders (IMWA.FIRST_MEMBER 0 and 1). Networks on the line between them are tested:
the one in the middle is their average. Means over seeds stand in the table and in barrier.png.

    python benchmarks/barrier.py --data-root datasets --seeds 1 2 3 4 5 6 7 8 9 10
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect

# isort: split
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ssod_imwa.analysis.build import build_evaluate, build_recompute, open_run
from ssod_imwa.analysis.interpolation import interpolate
from ssod_imwa.cli import log_to_stderr, run_main
from ssod_imwa.engine.checkpoint.models import read_models
from ssod_imwa.engine.checkpoint.output import FINAL
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.run import train
from ssod_imwa.visualization.style import color, finish, panels

RECIPE = Path(__file__).parents[1] / "configs/cifar10_lt_maps/balanced_softmax.yaml"
STARTS = {"pretrained": "package:efficientnet_lite0", "random": ""}
NORMS = {"average": "batch norms averaged", "recompute": "batch norms re-estimated"}
NAMES = {"loss": "test cross-entropy", "top1": "test accuracy (%)"}
SHARES = np.linspace(0, 1, 9)


def main() -> None:
    """Train the pairs, walk from one member to the other, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True, metavar="DIR", help="of the cached maps")
    parser.add_argument("--output", type=Path, default=Path("output/barrier"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="K")
    parser.add_argument("--iterations", type=int, default=400, metavar="T")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="of the test set")
    arguments = parser.parse_args()
    log_to_stderr()
    lines: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for start in STARTS:
        for seed in arguments.seeds:
            for norms, numbers in between(start, seed, arguments).items():
                lines.setdefault((start, norms), []).append(numbers)
            gc.collect()
    print_table(lines)
    path = arguments.output / "barrier.png"
    draw(lines).savefig(path)
    print(path)


def between(start: str, seed: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Numbers on the line between the members of a seed, by what is done to batch norms."""
    folders = [arguments.output / f"{start}_seed{seed}_member{member}" for member in (0, 1)]
    for member, folder in enumerate(folders):
        settings = {
            "MODEL.WEIGHTS": STARTS[start],
            "SOLVER.MAX_ITER": arguments.iterations,
            "IMWA.FIRST_MEMBER": member,
            "SEED": seed,
            "OUTPUT_DIR": folder,
            "DATASETS.ROOT": arguments.data_root,
        }
        overrides = [str(x) for pair in settings.items() for x in pair]
        if not (folder / FINAL).is_file() and train(
            load_config(RECIPE, overrides), resume_from=True
        ):
            raise SystemExit(1)
    run = open_run(folders[0])
    ends = [read_models(folder).weights for folder in folders]
    evaluate, recompute = build_evaluate(run, arguments.images), build_recompute(run)
    return {
        kind: interpolate(
            *(run.model, *ends, SHARES, evaluate),
            recompute=recompute if kind == "recompute" else None,
        )
        for kind in NORMS
    }


def print_table(lines: dict[tuple[str, str], list[dict[str, np.ndarray]]]) -> None:
    """Ends, middle, and how far the middle is above or below the mean of the ends."""
    table = Table("start", "batch norms", "seeds", *(f"{x}: ends" for x in NAMES))
    for name in NAMES:
        table.add_column(f"{name}: average")
        table.add_column("above the ends ± s.e.")
    for (start, norms), numbers in lines.items():
        cells = {name: np.stack([line[name] for line in numbers]) for name in NAMES}
        middle = len(SHARES) // 2
        ends = {name: x[:, [0, -1]].mean(1) for name, x in cells.items()}
        row = [f"{x.mean():.2f}" for x in ends.values()]
        for name, x in cells.items():
            above = x[:, middle] - ends[name]
            error = above.std(ddof=1) / len(above) ** 0.5 if len(above) > 1 else float("nan")
            row += [f"{x[:, middle].mean():.2f}", f"{above.mean():+.2f} ± {error:.2f}"]
        table.add_row(start, NORMS[norms], str(len(numbers)), *row)
    Console(width=170).print(table)


def draw(lines: dict[tuple[str, str], list[dict[str, np.ndarray]]]) -> Figure:
    """A panel for each start and number; thin lines are seeds, thick ones their mean."""
    figure, axes = panels(len(STARTS), len(NAMES), width=4.5, height=3)
    for row, start in zip(axes, STARTS, strict=True):
        for axis, (name, unit) in zip(row, NAMES.items(), strict=True):
            for number, (norms, words) in enumerate(NORMS.items()):
                seeds = np.stack([line[name] for line in lines[start, norms]])
                axis.plot(SHARES, seeds.T, color=color(number), lw=0.6, alpha=0.4)
                axis.plot(SHARES, seeds.mean(0), color=color(number), lw=2, label=words)
            axis.set_title(f"{start} start")
            finish(axis, x="from one member to the other", y=unit)
    return figure


if __name__ == "__main__":
    run_main(main)
