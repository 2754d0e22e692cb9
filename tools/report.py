#!/usr/bin/env python
"""Write one HTML page about finished runs, readable by who was not there.

Examples:
  one run            %(prog)s output/digits_unbiased_teacher_imwa
  several, compared  %(prog)s output/a output/b --output comparison.html
  without models     %(prog)s RUN --no-models

The page has final figures, what differs between the configurations, curves of members and averages,
what each average gained, pseudo-labels beside the truth, classes by frequency, resources and the
commands; and, with models and data at hand, test images on which the first run is best and worst
and those on which two runs disagree, or a classifier's confusions and calibration. It loads nothing
from the network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import log_to_stderr, require_folder, require_new, run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="new page (default: RUN_DIR/report.html of the first, over what is there)",
    )
    parser.add_argument(
        "--no-models", action="store_true", help="do not run models for example pictures"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        metavar="N",
        help="test images that detectors look at (200)",
    )
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images = {arguments.images} is not allowed (must be at least 1)")
    return arguments


def main() -> None:
    """Write the page and name it."""
    arguments = parse_arguments()
    log_to_stderr()
    # Seconds to import, which --help need not wait for.
    from ssod_imwa.analysis.report import add_overview, add_run, read_runs
    from ssod_imwa.analysis.report_pictures import add_examples
    from ssod_imwa.engine.checkpoint.atomic import write_output
    from ssod_imwa.visualization.page import Page

    if arguments.output is not None:
        require_new(arguments.output)
    runs = read_runs(arguments.runs)
    output = arguments.output or runs[0].folder / "report.html"
    require_folder(output.parent)
    page = Page(f"Report on {', '.join(run.name for run in runs)}")
    add_overview(page, runs)
    if not arguments.no_models:
        add_examples(page, runs, images=arguments.images)
    for run in runs:
        add_run(page, run)
    write_output(output, page.render().encode())
    print(output)


if __name__ == "__main__":
    run_main(main)
