"""Which options stand where in the configuration tree, and when they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import Option, Switch, Values, options_of


@dataclass(frozen=True)
class Section:
    """A group of keys.

    Attributes:
        prefix: of its keys, such as "CLS.LOSS"; "" for those at the top.
        options: the dataclass that declares them.
        when: other keys and the values at which these keys are read; all have to hold.
        names: of the options that are its keys; None for all.
        per_member: whether members may differ in all of them, whatever each option says: what they
            describe is built anew for each member.
    """

    prefix: str
    options: type
    when: Mapping[str, Values] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    per_member: bool = False

    # Both are asked for some hundred times whenever a configuration is built.
    @functools.cached_property
    def by_key(self) -> Mapping[str, Option]:
        """Options by the full names of their keys."""
        return {
            self._key(name): replace(item, per_member=item.per_member or self.per_member)
            for name, item in options_of(self.options).items()
            if self.names is None or name in self.names
        }

    @functools.cached_property
    def parts(self) -> Sequence[Section]:
        """This section, divided by what its options depend on among themselves."""
        names: dict[str, list[str]] = {}
        conditions: dict[str, Mapping[str, Values]] = {}
        for name, item in sorted(options_of(self.options).items(), key=lambda x: bool(x[1].when)):
            group = repr(item.when)
            names.setdefault(group, []).append(name)
            conditions[group] = {self._key(other): values for other, values in item.when.items()}
        return [
            replace(self, when={**self.when, **conditions[group]}, names=tuple(those))
            for group, those in names.items()
        ]

    def _key(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


def options_by_key(sections: Sequence[Section]) -> dict[str, Option]:
    """The options of several sections by the full names of their keys."""
    return {key: item for section in sections for key, item in section.by_key.items()}


def active_sections(sections: Sequence[Section], values: Mapping[str, Any]) -> list[Section]:
    """The parts of sections whose conditions hold.

    Args:
        sections: all; one that decides over another comes before it.
        values: what is set, by full key; other keys have the defaults of active sections.
    """
    known: dict[str, Any] = {}
    active = []
    for section in _parts(sections):
        if not any(_unmet(section, known)):
            active.append(section)
            for key, item in section.by_key.items():
                known[key] = values.get(key, item.default)
    return active


def _parts(sections: Iterable[Section]) -> Iterator[Section]:
    for section in sections:
        yield from section.parts


def _unmet(section: Section, values: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a section's conditions that do not hold, in order."""
    return (
        name
        for name, allowed in section.when.items()
        if name not in values or values[name] not in allowed
    )


def _unmet_nearest(
    sections: Sequence[Section], key: str, values: Mapping[str, Any]
) -> dict[str, list[Values]]:
    """By key, the conditions that keep a key out of the tree, of the sections that come nearest.

    Args:
        sections: as for `active_sections`; some declare the key.
        key: in full.
        values: of the keys in the tree.
    """
    nearest: dict[str, list[Values]] = {}
    most = 0
    for section in _parts(sections):
        if key not in section.by_key:
            continue
        condition = next(_unmet(section, values))
        met = list(section.when).index(condition)
        if met > most:
            most, nearest = met, {}
        if met == most:
            nearest.setdefault(condition, []).append(section.when[condition])
    return nearest


def why_inactive(sections: Sequence[Section], key: str, values: Mapping[str, Any]) -> str:
    """Why a key that some section declares is not in the tree, as the second half of a sentence.

    Args:
        sections: as for `active_sections`.
        key: in full.
        values: of the keys in the tree.

    Example:
        >>> from ssod_imwa.config.options import Options, option
        >>> @dataclass(frozen=True)
        ... class LossOptions(Options):
        ...     name: str = option("cross_entropy", "the loss", choices=("cross_entropy", "focal"))
        >>> @dataclass(frozen=True)
        ... class FocalOptions(Options):
        ...     gamma: float = option(1.0, "exponent of the modulating factor", low=0)
        >>> loss = Section("LOSS", LossOptions)
        >>> focal = Section("LOSS", FocalOptions, when={"LOSS.NAME": ("focal",)})
        >>> why_inactive([loss, focal], "LOSS.GAMMA", {"LOSS.NAME": "cross_entropy"})
        "has no meaning with LOSS.NAME = 'cross_entropy' (it belongs to LOSS.NAME = 'focal')"
    """
    unmet = _unmet_nearest(sections, key, values)
    # A condition on a key that is in the tree says more than one on a key that is itself missing.
    condition = next((name for name in unmet if name in values), next(iter(unmet)))
    if condition not in values:
        return why_inactive(sections, condition, values)
    wanted = f"{condition} {in_words(unmet[condition], repr)}"
    return f"has no meaning with {condition} = {values[condition]!r} (it belongs to {wanted})"


def in_words(values: Iterable[Values], name: Callable[[object], str]) -> str:
    """Values of a key, after its name: "= 'ncl' or 'ecl'", "above 0"."""
    listed: list[str] = []
    words: list[str] = []
    for entry in values:
        if isinstance(entry, Switch):
            words.append(entry.words)
        else:
            listed += map(name, entry)
    equal = [f"= {' or '.join(dict.fromkeys(listed))}"] if listed else []
    return " or ".join([*equal, *dict.fromkeys(words)])


def build_tree(sections: Sequence[Section]) -> CfgNode:
    """The defaults of sections as a configuration.

    Raises:
        ValueError: two sections have one key.
    """
    tree = CfgNode()
    for section in sections:
        for key, item in section.by_key.items():
            *parents, leaf = key.split(".")
            node = tree
            for part in parents:
                if part not in node:
                    node[part] = CfgNode()
                node = node[part]
            if leaf in node:
                raise ValueError(f"{key} is declared twice")
            node[leaf] = _copied(item.default)
    return tree


def _copied(value: Any) -> Any:
    return [_copied(inner) for inner in value] if isinstance(value, list) else value
