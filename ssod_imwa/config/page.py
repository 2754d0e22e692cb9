"""The page that documents every key, made of the sections that declare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssod_imwa.config.options import Option, Values
from ssod_imwa.config.sections import Section, in_words, options_by_key

HEADER = """\
# Configuration keys

Made by `python tools/keys.py --write docs/keys.md` from the options that are declared beside what
reads them; do not edit it. A key is in the configuration only where it is read: setting it
elsewhere is an error that names what it belongs to. Files hold keys as YAML, command lines as
`KEY VALUE`.
"""
TYPES = {
    bool: "True, False",
    int: "integer",
    float: "number",
    str: "text",
    list: "list",
    dict: "block of keys",
}


def keys_page(chapters: Mapping[str, Sequence[Section]]) -> str:
    """Every key as Markdown: default, allowed values, meaning, and when it is read.

    Args:
        chapters: sections by the title that they stand under.
    """
    options = options_by_key([section for part in chapters.values() for section in part])
    free = [f"`{key}`" for key, item in options.items() if item.free]
    own = [f"`{key}`" for key, item in options.items() if item.per_member]
    decays = [f"`{key}`" for key, item in options.items() if item.decay]
    scaled = [f"`{key}`" for key, item in options.items() if item.iterations]
    blocks = [
        HEADER,
        f"A resumed run may change: {', '.join(free)}.\n",
        f"`--scale` multiplies what counts a member's iterations: {', '.join(scaled)}.\n",
        "`--scale-batch` divides the same keys by the new batch over the old, and takes these "
        f"decays to that power: {', '.join(decays)}.\n",
        f"Members may differ in (`IMWA.MEMBER_OVERRIDES`): {', '.join(own)}.\n",
    ]
    for title, sections in chapters.items():
        blocks += [f"## {title}\n", *_tables(sections)]
    return "\n".join(blocks)


def _tables(sections: Sequence[Section]) -> list[str]:
    """A table for all sections of one prefix and condition, in first order."""
    sections = [part for section in sections for part in section.parts]
    common = set.intersection(*(set(_conditions(section)) for section in sections))
    tables: dict[tuple[Any, ...], dict[str, Option]] = {}
    for section in sections:
        tables.setdefault((section.prefix, _conditions(section)), {}).update(section.by_key)
    blocks = []
    for (prefix, conditions), options in tables.items():
        special = [
            f"`{key}` {in_words([values], lambda value: f'`{value}`')}"
            for key, values in conditions
            if (key, values) not in common
        ]
        lines = [f"### {prefix or 'At the top'}", ""]
        if special:
            lines += [f"Read with {' and '.join(special)}.", ""]
        lines += ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [_row(key, item) for key, item in options.items()]
        blocks.append("\n".join(lines) + "\n")
    return blocks


def _conditions(section: Section) -> tuple[tuple[str, Values], ...]:
    return tuple(section.when.items())


def _row(key: str, item: Option) -> str:
    cells = [f"`{key}`", f"`{item.default!r}`", _allowed(item), item.help]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _allowed(item: Option) -> str:
    if item.choices:
        values = ", ".join(f"`{choice!r}`" for choice in item.choices)
    else:
        values = ", ".join(filter(None, (TYPES[item.element], item.range)))
    return f"list of: {values}" if item.is_list else values
