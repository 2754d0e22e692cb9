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

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import print_table, run_main
from ssod_imwa.runs.comparison import folder_of, read_groups, require_metrics
from ssod_imwa.runs.results import MODELS
from ssod_imwa.visualization.table import comparison_markdown, comparison_rows, comparison_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="OUTPUT_DIR of each run")
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="figures (default: AP and AP50; of classifiers top1, many, h_mean and so on)",
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
    folders = map(folder_of, arguments.run_dirs)
    if arguments.baseline is not None and folder_of(arguments.baseline) not in folders:
        parser.error(f"--baseline {arguments.baseline} is not one of the given runs")
    return arguments


def main() -> None:
    """Read, group and print."""
    arguments = parse_arguments()
    groups, baseline = read_groups(arguments.run_dirs, baseline=arguments.baseline)
    header, rows = comparison_rows(
        groups, metrics=arguments.metrics, model=arguments.model, baseline=baseline
    )
    require_metrics(groups, arguments.metrics or ())
    if arguments.format == "markdown":
        print(comparison_markdown(header, rows))
    else:
        print_table(comparison_table(header, rows))


if __name__ == "__main__":
    run_main(main)
