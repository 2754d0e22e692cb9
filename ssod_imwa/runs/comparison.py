"""Finished runs read from their folders, in groups that differ in seed and fold alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssod_imwa.runs.groups import Group, group_runs
from ssod_imwa.runs.results import ResultsError, read_results
from ssod_imwa.runs.run import read_settings


def read_groups(
    run_dirs: Sequence[str | Path], *, baseline: str | Path | None = None
) -> tuple[list[Group], Group | None]:
    """Groups of runs in the order of their first ones, and the group of one of them.

    Args:
        run_dirs: OUTPUT_DIR, or results.json, of each run.
        baseline: one of them, or None.

    Raises:
        ResultsError: results are missing or damaged.
    """
    runs = {folder_of(run_dir): read_results(run_dir) for run_dir in run_dirs}
    groups = group_runs(
        list(runs.values()),
        names=folder_names(list(runs)),
        settings=[read_settings(folder) for folder in runs],
    )
    if baseline is None:
        return groups, None
    chosen = runs[folder_of(baseline)]
    return groups, next(g for g in groups if any(run is chosen for run in g.runs))


def require_metrics(groups: Sequence[Group], names: Sequence[str]) -> None:
    """Refuse names of figures that none of the runs has: a column of dashes tells nothing.

    Raises:
        ResultsError: says which names there are.
    """
    runs = [run for group in groups for run in group.runs]
    known = {name for run in runs for item in run.averages for name in item.metrics}
    if unknown := [name for name in names if name not in known]:
        raise ResultsError(
            f"--metrics {' '.join(unknown)}: no run has it (choose from {', '.join(sorted(known))})"
        )


def folder_of(run_dir: str | Path) -> Path:
    """The folder of a run, given it or its results.json, in one spelling."""
    path = Path(run_dir).resolve()
    return path.parent if path.is_file() else path


def folder_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths of those whose names are the same.

    Example:
        >>> folder_names([Path("/a/run"), Path("/b/run"), Path("/b/other")])
        ['/a/run', '/b/run', 'other']
    """
    counts = Counter(folder.name for folder in folders)
    return [folder.name if counts[folder.name] == 1 else str(folder) for folder in folders]
