#!/usr/bin/env python
"""Train the runs of a table of configs/tables, and print the paper's numbers beside ours.

Examples:
  the digits table            %(prog)s configs/tables/digits_demo.yaml
  two rows, three seeds       %(prog)s TABLE --rows CE "CE + IMWA" --seeds 1 2 3
  a twentieth of the schedule %(prog)s TABLE --scale 0.05
  what is finished so far     %(prog)s TABLE --print-only --format markdown
  with other settings         %(prog)s TABLE SOLVER.AMP.ENABLED True --data-root ~/datasets

Runs that rows share, such as a common first stage, are trained once for each seed, in
OUTPUT/TABLE/RUN_seedK, or OUTPUT/TABLE_xSCALE/RUN_seedK. Interrupted, the same command goes on
where it stopped; finished runs are not trained again. The table is also written beside the runs,
as table.md. A shorter schedule tells whether everything runs, not what a method reaches.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import log_to_stderr, print_table, run_main
from ssod_imwa.engine.checkpoint.atomic import write_output
from ssod_imwa.papers.report import report
from ssod_imwa.papers.reproduction import Reproduction
from ssod_imwa.papers.tables import choose_rows, read_table
from ssod_imwa.visualization.table import comparison_markdown, comparison_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", metavar="TABLE", help="file of configs/tables")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="rows (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1], metavar="K", help="of each run (1)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="S", help="factor of every schedule (1)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="DIR",
        help="folder of tables (output)",
    )
    parser.add_argument("--data-root", metavar="DIR", help="folder of all data sets")
    parser.add_argument("--print-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--format", choices=("table", "markdown"), default="table", help="default: table"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY VALUE",
        help="settings for every run; they stand before --rows and --seeds",
    )
    arguments = parser.parse_intermixed_args()
    if not 0 < arguments.scale < float("inf"):
        parser.error(f"--scale {arguments.scale:g} is not allowed (must be above 0)")
    return arguments


def main() -> int:
    """Train what is missing, then print."""
    arguments = parse_arguments()
    log_to_stderr()
    root = [] if arguments.data_root is None else ["DATASETS.ROOT", arguments.data_root]
    table = read_table(arguments.table)
    rows = choose_rows(table, arguments.rows)
    reproduction = Reproduction(
        table, arguments.output, arguments.scale, (*root, *arguments.overrides)
    )
    if not arguments.print_only:
        status = reproduction.train(rows, arguments.seeds)
        if status:
            print(f"go on with: {shlex.join(sys.orig_argv)}", file=sys.stderr)
            return status
    header, cells = report(table, rows, reproduction.results(rows, arguments.seeds))
    caption = reproduction.caption(arguments.seeds)
    markdown = f"{caption}\n\n{comparison_markdown(header, cells)}"
    if arguments.format == "markdown":
        print(markdown)
    else:
        print(caption)
        print_table(comparison_table(header, cells))
    if reproduction.folder.is_dir():
        write_output(reproduction.folder / "table.md", f"{markdown}\n".encode())
    return 0


if __name__ == "__main__":
    run_main(main)
