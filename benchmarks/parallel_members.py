"""How much sooner M members are done that train at once, a CPU core each, than in turn on one.

Both train the same recipe with one thread a process, in turn and at once alternately; the least
seconds of each stand in the table, without the start of the processes. The averages are compared
bit for bit.

    python benchmarks/parallel_members.py                # half a minute and a minute a pair
    python benchmarks/parallel_members.py --config-file configs/digits/unbiased_teacher_imwa.yaml
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from ssod_imwa.cli import run_main
from ssod_imwa.runs.results import read_results
from ssod_imwa.runs.trained import read_trained

TOOL = Path(__file__).parents[1] / "tools/train_net.py"
RECIPE = ["configs/digit_images/cross_entropy.yaml", "configs/digit_images/imwa.yaml"]


def main() -> None:
    """Train both ways and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", nargs="+", default=RECIPE, metavar="FILE")
    parser.add_argument("--members", type=int, default=2, metavar="M")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY VALUE", help="settings of both"
    )
    arguments = parser.parse_args()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    weights = {}
    for _ in range(arguments.repeats):
        for at_once in seconds:
            with tempfile.TemporaryDirectory() as folder:
                _train(arguments, folder, at_once=at_once)
                seconds[at_once].append(read_results(folder).wall_time)
                weights[at_once] = read_trained(folder).models
    _print(
        arguments, {kind: min(values) for kind, values in seconds.items()}, _same(*weights.values())
    )


def _train(arguments: argparse.Namespace, folder: str, *, at_once: bool) -> None:
    """Train in processes of one thread each; ends with what they say if they fail."""
    processes = str(arguments.members if at_once else 1)
    command = [sys.executable, str(TOOL), "--num-gpus", processes]
    command += ["--config-file", *arguments.config_file, "MODEL.DEVICE", "cpu"]
    command += ["OUTPUT_DIR", folder]
    command += ["IMWA.MEMBERS", str(arguments.members), "IMWA.PARALLEL", str(at_once)]
    result = subprocess.run(
        [*command, *arguments.set],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(result.stderr)


def _same(
    one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]
) -> bool:
    """Whether all tensors of all models are equal."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[model][name])
        for model, state in one.items()
        for name, tensor in state.items()
    )


def _print(arguments: argparse.Namespace, seconds: dict[bool, float], same: bool) -> None:
    load = psutil.getloadavg()[0]
    table = Table(title=f"{' + '.join(arguments.config_file)}, load of the machine {load:.1f}")
    for column in ("members", "in turn, 1 core", "at once, M cores", "times as fast", "same bits"):
        table.add_column(column, justify="right")
    table.add_row(
        str(arguments.members),
        f"{seconds[False]:.1f} s",
        f"{seconds[True]:.1f} s",
        f"{seconds[False] / seconds[True]:.2f}",
        "yes" if same else "NO",
    )
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
