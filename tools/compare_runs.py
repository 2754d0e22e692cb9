#!/usr/bin/env python
"""Compare finished runs: mean ± standard deviation over seeds of runs with equal settings.

Examples:
  as Markdown, for a report       %(prog)s output/baseline_* output/imwa_*
  with the gain over a baseline   %(prog)s output/* --baseline output/baseline_seed1
  a wide table for the terminal   %(prog)s output/* --format table --metrics AP AP50 VOC/AP50

Runs whose settings differ in nothing but seed and fold form a row, as results.json and config.yaml
tell. Rows that would be called the same are named by their folders, and so is each of several runs
of one seed. The figures are those of the last averaged teacher or, without one, student. The gain
is the mean of the differences between runs of equal seed and fold. Note that IMWA with M members
takes M x T steps, so runs without averaging and M times the iterations belong beside it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssod_imwa.cli import print_table, run_main
from ssod_imwa.runs.results import MODELS, group_runs, read_results
from ssod_imwa.runs.run import read_settings
from ssod_imwa.visualization.table import comparison_markdown, comparison_rows, comparison_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="OUTPUT_DIR of each run")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="figures (default: every AP and AP50)"
    )
    parser.add_argument(
        "--model", choices=MODELS, help="whose figures (default: the teacher's if there is one)"
    )
    parser.add_argument(
        "--baseline", metavar="RUN_DIR", help="one of the runs: show gains over its row"
    )
    parser.add_argument(
        "--format", choices=("markdown", "table"), default="markdown", help="default: markdown"
    )
    arguments = parser.parse_args()
    if arguments.baseline is not None and arguments.baseline not in arguments.run_dirs:
        parser.error(f"--baseline {arguments.baseline} is not one of the given runs")
    return arguments


def main() -> None:
    """Read, group and print."""
    arguments = parse_arguments()
    runs = {folder_of(run_dir): read_results(run_dir) for run_dir in arguments.run_dirs}
    groups = group_runs(
        list(runs.values()),
        names=names_of(list(runs)),
        settings=[read_settings(folder) for folder in runs],
    )
    baseline = None
    if arguments.baseline is not None:
        chosen = runs[folder_of(arguments.baseline)]
        baseline = next(g for g in groups if any(run is chosen for run in g.runs))
    header, rows = comparison_rows(
        groups, metrics=arguments.metrics, model=arguments.model, baseline=baseline
    )
    if arguments.format == "markdown":
        print(comparison_markdown(header, rows))
    else:
        print_table(comparison_table(header, rows))


def folder_of(run_dir: str) -> Path:
    """The folder of a run, given it or its results.json, in one spelling."""
    path = Path(run_dir).resolve()
    return path.parent if path.is_file() else path


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths of those whose names are the same."""
    counts = Counter(folder.name for folder in folders)
    return [folder.name if counts[folder.name] == 1 else str(folder) for folder in folders]


if __name__ == "__main__":
    run_main(main)
