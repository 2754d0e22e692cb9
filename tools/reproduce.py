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
import logging
from pathlib import Path

from fvcore.common.config import CfgNode

from ssod_imwa.cli import log_to_stderr, print_table, run_main
from ssod_imwa.engine.checkpoint.atomic import write_text
from ssod_imwa.papers.reproduction import (
    check_recipe,
    finished,
    report,
    run_config,
    scaled,
    write_recipe,
)
from ssod_imwa.papers.tables import Run, Table, choose_rows, needed_runs, read_table, shown_runs
from ssod_imwa.runs.open import open_task
from ssod_imwa.runs.results import Results
from ssod_imwa.runs.run import FREE_KEYS, train
from ssod_imwa.visualization.table import comparison_markdown, comparison_table

logger = logging.getLogger(__name__)


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
    parser.add_argument("--output", default="output", metavar="DIR", help="default: output")
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
    table = read_table(arguments.table)
    rows = choose_rows(table, arguments.rows)
    if not arguments.print_only:
        wanted = [(run, seed) for seed in arguments.seeds for run in needed_runs(table, rows)]
        for number, (run, seed) in enumerate(wanted, start=1):
            logger.info("run %d of %d: %s, seed %d", number, len(wanted), run.name, seed)
            status = train_run(arguments, table, run, seed)
            if status:
                return status
    found = {
        (run.name, seed): results
        for run in shown_runs(table, rows)
        for seed in arguments.seeds
        if (results := finished_run(arguments, table, run, seed))
    }
    header, cells = report(table, rows, found)
    caption = caption_of(arguments, table)
    markdown = f"{caption}\n\n{comparison_markdown(header, cells)}"
    folder = folder_of(arguments)
    if folder.is_dir():
        write_text(folder / "table.md", f"{markdown}\n", kind="table")
    if arguments.format == "markdown":
        print(markdown)
    else:
        print(caption)
        print_table(comparison_table(header, cells))
    return 0


def train_run(arguments: argparse.Namespace, table: Table, run: Run, seed: int) -> int:
    """Train a run of a table, or go on with it, unless it is finished; its exit status."""
    if finished_run(arguments, table, run, seed):
        return 0
    cfg = config_of(arguments, table, run, seed)
    check_recipe(cfg)
    write_recipe(cfg)
    if arguments.scale != 1:
        # A task counts epochs in iterations, of which an episode needs one.
        cfg = scaled(open_task(cfg).cfg if cfg.CLS.SCHEDULE.EPOCHS else cfg, arguments.scale)
    return train(cfg, resume_from=True)


def finished_run(
    arguments: argparse.Namespace, table: Table, run: Run, seed: int
) -> Results | None:
    """The results of a run, or None if it has not come to its end."""
    results = finished(folder_of(arguments, run.name, seed))
    if results is not None:
        check_recipe(config_of(arguments, table, run, seed))
    return results


def config_of(arguments: argparse.Namespace, table: Table, run: Run, seed: int) -> CfgNode:
    """The configuration of a run, before it is scaled."""
    root = [] if arguments.data_root is None else ["DATASETS.ROOT", arguments.data_root]
    return run_config(
        table,
        run,
        seed=seed,
        output=folder_of(arguments, run.name, seed),
        initial=None if run.after is None else folder_of(arguments, run.after, seed),
        overrides=[*root, *arguments.overrides],
    )


def folder_of(
    arguments: argparse.Namespace, run: str | None = None, seed: int | None = None
) -> Path:
    """The folder of a table or of a run of it: other schedules are other runs."""
    name = Path(arguments.table).stem
    if arguments.scale != 1:
        name += f"_x{arguments.scale:g}"
    folder = Path(arguments.output) / name
    return folder if run is None else folder / f"{run}_seed{seed}"


def caption_of(arguments: argparse.Namespace, table: Table) -> str:
    """What is in the table, and how far it is from the paper."""
    seeds = ", ".join(map(str, arguments.seeds))
    schedule = "" if arguments.scale == 1 else f", {arguments.scale:g} times the schedule"
    changed = zip(arguments.overrides[::2], arguments.overrides[1::2], strict=False)
    settings = "".join(f", {key} = {value}" for key, value in changed if key not in FREE_KEYS)
    return f"{table.title} (ours: seed {seeds}{schedule}{settings})"


if __name__ == "__main__":
    run_main(main)
