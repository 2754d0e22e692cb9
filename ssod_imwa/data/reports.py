"""What is wrong in a data set and what it holds, as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ssod_imwa.data.problems import Problem


@dataclass(frozen=True)
class Report:
    """What a check of a data set says.

    Attributes:
        lines: to be shown.
        is_sound: whether no problem was found; notes are none.
    """

    lines: tuple[str, ...]
    is_sound: bool


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Every problem under the file it is in."""
    lines = []
    by_file = sorted(problems, key=lambda problem: problem.file)
    for file, group in groupby(by_file, key=lambda problem: problem.file):
        lines += [file, *(f"  {problem.level}: {problem}" for problem in group)]
    return lines


def summary_line(name: str, *, images: int, problems: int) -> str:
    """One line on a whole data set.

    Example:
        >>> summary_line("birds", images=3, problems=1)
        'birds: 3 images, 1 problem'
    """
    return f"{name}: {images} images, {problems} problem{'' if problems == 1 else 's'}"


def imbalance_lines(counts: Sequence[int], what: str) -> list[str]:
    """The ratio of the largest class to the smallest, if each has something.

    Example:
        >>> imbalance_lines([30, 4], "boxes"), imbalance_lines([30, 0], "boxes")
        (['  imbalance 7.5 (most over fewest boxes of a class)'], [])
    """
    if min(counts) == 0:
        return []
    ratio = max(counts) / min(counts)
    return [f"  imbalance {ratio:.1f} (most over fewest {what} of a class)"]
