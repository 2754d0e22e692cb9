"""Whether a checkpoint can be continued exactly by the run that wants to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ssod_imwa import __version__
from ssod_imwa.errors import CheckpointError

FORMAT = 2
"""Layout of the files; a reader refuses every other."""
NOT_COMPARED = ("config", "classes", "stored_size")
"""Entries of a run's identity for the reader: the text has free keys, the data's digest names."""

_ABSENT = "(absent)"


class Change(NamedTuple):
    """An entry of the run's identity that differs; a missing one reads "(absent)"."""

    key: str
    saved: Any
    current: Any


def identity(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's entries and the library's major version: what has to be equal for an exact resume."""
    return {**run, "library major version": int(__version__.split(".")[0])}


def changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The entries in which two identities differ, sorted by name.

    Example:
        >>> changes({"T": 10, "seed": 1}, {"T": 20, "seed": 1})
        [Change(key='T', saved=10, current=20)]
    """
    return [
        Change(key, saved.get(key, _ABSENT), current.get(key, _ABSENT))
        for key in sorted(saved.keys() | current.keys())
        if key not in NOT_COMPARED and saved.get(key, _ABSENT) != current.get(key, _ABSENT)
    ]


def check_format(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a file has another layout than ours."""
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')}, written by version "
            f"{content.get('library')}, and format {FORMAT} is read (use that version, or train "
            "again)"
        )


def in_words(differences: Iterable[Change]) -> str:
    """Changes in one line: each key with its saved and its current value."""
    return ", ".join(f"{c.key} (saved {c.saved}, now {c.current})" for c in differences)
