"""Something wrong in a data set: collected by readers and checkers of both tasks."""

from __future__ import annotations

from dataclasses import dataclass

from ssod_imwa.errors import DataError, one_line


@dataclass(frozen=True)
class Problem:
    """Something wrong, with what a person needs to find and mend it.

    Attributes:
        file: the image or annotation file.
        place: the image or entry in words, empty when the data set as a whole is meant.
        what: the kind of problem, the same words for each case of it.
        value: what was found.
        rule: what is allowed, or what will be done.
        level: "error" stops a run, "warning" is logged, "note" is only shown by the checker.
        position: place of the image in the data set, or -1.
        box: number of the box in its image, or -1 when the image itself is meant.
    """

    file: str
    place: str
    what: str
    value: str
    rule: str
    level: str = "error"
    position: int = -1
    box: int = -1

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        return one_line(f"{where}{self.what}: {self.value} ({self.rule})")


def report(problem: Problem, problems: list[Problem] | None) -> None:
    """Collect a reader's problem, or stop at it when nobody collects.

    Raises:
        DataError: `problems` is None.
    """
    if problems is None:
        raise DataError(f"{problem.file}: {problem}")
    problems.append(problem)
