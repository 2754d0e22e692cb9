"""Options declared beside what reads them, and the configuration tree made of them.

A method, loss, detector or sampler has one frozen dataclass whose fields say everything about its
keys: default, meaning, range, choices. The tree, the checks, `docs/keys.md`, what `--scale` scales
and what a resume may change are made from these classes::

    @dataclass(frozen=True)
    class FocalOptions:
        gamma: float = option(1.0, "exponent of the modulating factor", low=0)

    SECTIONS = [Section("CLS.LOSS", FocalOptions, when={"CLS.LOSS.NAME": ("focal",)})]

A section is part of the tree only when `when` holds, so a key of something that is not trained is
not in the tree, and setting it is an error that names what it belongs to.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from fvcore.common.config import CfgNode

INFINITY = float("inf")
_METADATA = "option"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Option:
    """What a key is beside its name.

    Attributes:
        default: its value where nothing is set; lists are copied.
        help: one line: what it means, with its unit.
        element: type of the value, or of a list's elements (list for lists of lists).
        choices: allowed values, of each element of a list; empty for any.
        low: smallest allowed value, of each element of a list.
        high: largest allowed value.
        iterations: whether it counts a member's own iterations, which `--scale` multiplies.
        free: whether it changes neither weights nor data order, so that a resume may change it.
    """

    default: Any
    help: str
    element: type
    choices: tuple[object, ...] = ()
    low: float = -INFINITY
    high: float = INFINITY
    iterations: bool = False
    free: bool = False

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[object] = (),
    low: float = -INFINITY,
    high: float = INFINITY,
    iterations: bool = False,
    free: bool = False,
) -> Any:
    """A field of an options class; see `Option` for the arguments.

    Its type is the annotation's: bool, int, float, str, a Literal, or a list of one of them.
    """
    settings = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "iterations": iterations,
        "free": free,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={_METADATA: settings})
    return field(default=default, metadata={_METADATA: settings})


def options_of(kind: type) -> dict[str, Option]:
    """The options of a class by the last part of their keys, in the order of its fields.

    Raises:
        TypeError: a field is not made by `option`, or its annotation is not a type of options.
    """
    hints = typing.get_type_hints(kind)
    found = {}
    for item in dataclasses.fields(kind):
        if _METADATA not in item.metadata:
            raise TypeError(f"{kind.__name__}.{item.name} is not an option (make it by option())")
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
        element = _element(kind, item.name, hints[item.name])
        found[item.name.upper()] = Option(default, element=element, **item.metadata[_METADATA])
    return found


def _element(kind: type, name: str, hint: Any) -> type:
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        if typing.get_origin(hint) is list:  # anchor sizes: a list for each level
            return list
    if typing.get_origin(hint) is typing.Literal:
        return type(typing.get_args(hint)[0])
    if hint not in (bool, int, float, str):
        raise TypeError(f"{kind.__name__}.{name}: {hint} is not a type of options")
    return hint


@dataclass(frozen=True)
class Section:
    """A group of keys.

    Attributes:
        prefix: of its keys, such as "CLS.LOSS"; "" for those at the top.
        options: the dataclass that declares them.
        when: other keys and the values at which these keys are read; all have to hold.
    """

    prefix: str
    options: type
    when: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def by_key(self) -> dict[str, Option]:
        """Options by the full names of their keys."""
        start = f"{self.prefix}." if self.prefix else ""
        return {f"{start}{name}": item for name, item in options_of(self.options).items()}


def active_sections(sections: Sequence[Section], values: Mapping[str, Any]) -> list[Section]:
    """The sections whose conditions hold.

    Args:
        sections: all; one that decides over another comes before it.
        values: what is set, by full key; other keys have the defaults of active sections.
    """
    known = {}
    found = []
    for section in sections:
        if all(known.get(key, MISSING) in allowed for key, allowed in section.when.items()):
            found.append(section)
            for key, item in section.by_key().items():
                known[key] = values.get(key, item.default)
    return found


def build_tree(sections: Sequence[Section]) -> CfgNode:
    """The defaults of sections as a configuration.

    Raises:
        ValueError: two sections have one key.
    """
    tree = CfgNode()
    for section in sections:
        node = tree
        for part in section.prefix.split(".") if section.prefix else ():
            node = node.setdefault(part, CfgNode())
        for key, item in options_of(section.options).items():
            if key in node:
                raise ValueError(f"{section.prefix}.{key} is declared twice")
            node[key] = list(item.default) if item.is_list else item.default
    return tree


def read_options(kind: type[_T], node: CfgNode) -> _T:
    """An options object with the values of a configuration's node.

    Example:
        >>> @dataclass(frozen=True)
        ... class FocalOptions:
        ...     gamma: float = option(1.0, "exponent of the modulating factor", low=0)
        >>> tree = build_tree([Section("CLS.LOSS", FocalOptions)])
        >>> read_options(FocalOptions, tree.CLS.LOSS)
        FocalOptions(gamma=1.0)
    """
    return kind(**{name.lower(): node[name] for name in options_of(kind)})
