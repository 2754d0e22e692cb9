#!/usr/bin/env python
"""Print every configuration key with its default, allowed values and meaning, as Markdown.

Examples:
  read it                 %(prog)s
  renew the documentation %(prog)s --write docs/keys.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ssod_imwa.interruptible  # noqa: F401 - first, for its effect
from ssod_imwa.cli import run_main
from ssod_imwa.config.page import keys_page
from ssod_imwa.errors import writing
from ssod_imwa.runs.config import CHAPTERS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write it here, over what is there"
    )
    return parser.parse_args()


def main() -> None:
    """Print the page, or write it."""
    arguments = parse_arguments()
    page = keys_page(CHAPTERS)
    if arguments.write is None:
        print(page, end="")
    else:
        with writing(arguments.write):
            arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
