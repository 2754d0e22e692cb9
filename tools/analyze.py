#!/usr/bin/env python
"""See where a trained classifier errs, and what its weights are like.

Examples:
  is its confidence right?            %(prog)s calibration output/digits_mfw
  which classes suffer?               %(prog)s classes output/digits_mfw
  how flat is the minimum?            %(prog)s landscape output/digits_mfw
  what lies between two runs?         %(prog)s interpolate output/seed1 output/seed2

Each subject prints its numbers and writes a picture to RUN/pictures; --help after its name says
what is seen in it. RUN is the OUTPUT_DIR of a classification run. See docs/analysis.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.analysis.subjects import SUBJECTS
from ssod_imwa.cli import print_table, refuse_settings, require_folder, run_main

BN_CHOICES = ("average", "recompute")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subjects = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    added = {}
    for name, (question, seen) in SUBJECTS.items():
        added[name] = subject = subjects.add_parser(name, help=question, description=seen)
        subject.add_argument("run", metavar="RUN", help="OUTPUT_DIR of a run")
        if name == "interpolate":
            subject.add_argument("other", metavar="RUN_B", help="another run, or a file of it")
        subject.add_argument("--output", metavar="DIR", help="folder (default: RUN/pictures)")
        if name not in ("members", "totals"):  # which load the run's snapshots
            subject.add_argument(
                "--weights", metavar="FILE", help="of the network (default: RUN's newest model)"
            )
        subject.add_argument(
            "--opts", nargs="*", default=[], metavar="KEY VALUE", help="settings to change"
        )
    add_options(added)
    return parser.parse_args()


def add_options(subjects: dict[str, argparse.ArgumentParser]) -> None:
    """Options of one subject each, named like the arguments of its function."""
    subjects["calibration"].add_argument(
        "--bins", type=int, default=15, metavar="N", help="of confidence (15)"
    )
    subjects["features"].add_argument(
        "--group", metavar="NAME", help="gradients after this group, such as layer1 (pooled ones)"
    )
    flat, line = subjects["landscape"], subjects["interpolate"]
    flat.add_argument("--directions", type=int, default=5, metavar="N", help="random ones (5)")
    flat.add_argument("--points", type=int, default=21, metavar="N", help="along each, odd (21)")
    flat.add_argument("--radius", type=float, default=1.0, metavar="R", help="largest step (1)")
    flat.add_argument("--plane", action="store_true", help="a plane of two directions instead")
    line.add_argument("--points", type=int, default=11, metavar="N", help="of lambda (11)")
    line.add_argument(
        "--bn", choices=(*BN_CHOICES, "both"), default="average", help="batch norms (average)"
    )
    for subject in (flat, line):
        subject.add_argument(
            "--images", type=int, default=0, metavar="N", help="about so many test images (all)"
        )
    totals = subjects["totals"]
    totals.add_argument(
        "--unlabeled", nargs="+", required=True, metavar="FILE", help="recipe of a run with DARP"
    )
    totals.add_argument(
        "--per-class", type=int, default=10, metavar="N", help="held-out images of a class (10)"
    )
    members, points = subjects["members"], subjects["embedding"]
    members.add_argument(
        "--bn", choices=BN_CHOICES, default="average", help="batch norms (average)"
    )
    members.add_argument("--metric", default="top1", metavar="NAME", help="to compare (top1)")
    points.add_argument("--images", type=int, default=50, metavar="N", help="of each class (50)")
    points.add_argument("--classes", type=int, default=10, metavar="N", help="at most (10)")
    points.add_argument("--perplexity", type=float, default=30.0, metavar="P", help="of t-SNE (30)")


def main() -> None:
    """Analyse, print the numbers, write the pictures and name the files."""
    arguments = vars(parse_arguments())
    # Seconds to import, which --help need not wait for.
    from ssod_imwa.analysis import commands, unlabeled_totals, weight_commands
    from ssod_imwa.analysis.build import open_run
    from ssod_imwa.visualization.plots import save_figures

    subject, output, folder = (arguments.pop(name) for name in ("subject", "output", "run"))
    pictures = Path(output or Path(folder) / "pictures")
    require_folder(pictures)
    overrides = arguments.pop("opts")
    instead = "--weights" if "weights" in arguments else "another RUN"
    refuse_settings(overrides, {"OUTPUT_DIR": "another RUN", "MODEL.WEIGHTS": instead})
    run = open_run(folder, weights=arguments.pop("weights", None), overrides=overrides)
    modules = (commands, weight_commands, unlabeled_totals)
    analyze = next(getattr(m, subject) for m in modules if hasattr(m, subject))
    finding = analyze(run, **arguments)
    for table in finding.tables:
        print_table(table)
    for path in save_figures(finding.figures, pictures):
        print(path)


if __name__ == "__main__":
    run_main(main)
