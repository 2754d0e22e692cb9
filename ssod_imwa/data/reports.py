"""What is wrong in a data set and what it holds, as lines of text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ssod_imwa.data.problems import Problem
from ssod_imwa.errors import one_line

_LEVELS = ("error", "warning", "note")
_SHOWN = 5  # findings of a kind


@dataclass(frozen=True)
class Report:
    """What a check of a data set says.

    Attributes:
        lines: to be shown.
        is_sound: whether no error was found; warnings and notes are none.
    """

    lines: tuple[str, ...]
    is_sound: bool


def problem_lines(problems: Sequence[Problem], *, show_all: bool = False) -> list[str]:
    """Problems by kind, errors first: how many there are and the first few.

    Args:
        problems: of one data set.
        show_all: name every one instead.
    """
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda problem: _LEVELS.index(problem.level)):
        kinds.setdefault((problem.level, problem.what), []).append(problem)
    lines = []
    for (level, what), group in kinds.items():
        rules = {problem.rule for problem in group}
        shared_rule = f" ({group[0].rule})" if len(rules) == 1 else ""
        lines.append(one_line(f"{level}: {len(group)} x {what}{shared_rule}"))
        count = len(group) if show_all else _SHOWN
        lines += [_finding(problem, with_rule=len(rules) > 1) for problem in group[:count]]
        if len(group) > count:
            lines.append(f"  and {len(group) - count} more (--all shows them)")
    return lines


def _finding(problem: Problem, *, with_rule: bool) -> str:
    where = f"{problem.place}: " if problem.place else ""
    rule = f" ({problem.rule})" if with_rule else ""
    return f"  {one_line(f'{problem.file}: {where}{problem.value}{rule}')}"


def summary_line(name: str, *, images: int, problems: Sequence[Problem]) -> str:
    """One line on a whole data set.

    Example:
        >>> problem = Problem("a.json", "", "class without boxes", "owl", "", level="warning")
        >>> summary_line("birds", images=3, problems=[problem])
        'birds: 3 images, 0 errors, 1 warning'
    """
    counts = Counter(problem.level for problem in problems)
    parts = [f"{images} images", _counted(counts["error"], "error")]
    if counts["warning"]:
        parts.append(_counted(counts["warning"], "warning"))
    return one_line(f"{name}: {', '.join(parts)}")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def is_sound(problems: Sequence[Problem]) -> bool:
    """Whether none of the problems stops a run."""
    return all(problem.level != "error" for problem in problems)


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
