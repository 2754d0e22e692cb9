"""Options declared beside what reads them, and the configuration tree made of them.

A method, loss, detector or sampler has one frozen dataclass whose fields say everything about its
keys: default, meaning, range, choices. The tree, the checks, `docs/keys.md`, what `--scale` scales
and what a resume may change are made from these classes::

    @dataclass(frozen=True)
    class FocalOptions:
        gamma: float = option(1.0, "exponent of the modulating factor", low=0)

    SECTIONS = [Section("CLS.LOSS", FocalOptions, when={"CLS.LOSS.NAME": ("focal",)})]

Subclass `Options` to have values out of range refused in Python, too. A section is part of the tree
only when `when` holds, so a key of something that is not trained is not in the tree, and setting it
is an error that names what it belongs to.
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
        above: a bound that is not allowed itself.
        below: a bound that is not allowed itself.
        iterations: whether it counts a member's own iterations, which `--scale` multiplies.
        free: whether it changes neither weights nor data order, so that a resume may change it.
    """

    default: Any
    help: str
    element: type
    choices: tuple[object, ...] = ()
    low: float = -INFINITY
    high: float = INFINITY
    above: float | None = None
    below: float | None = None
    iterations: bool = False
    free: bool = False

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)

    @property
    def range(self) -> str:
        """The allowed numbers in words, such as "at least 0, below 1"; "" for all."""
        closed = self.above is None and self.below is None
        if closed and self.low > -INFINITY and self.high < INFINITY:
            return f"{self.low:g}..{self.high:g}"
        lower = f"at least {self.low:g}" if self.low > -INFINITY else ""
        upper = f"at most {self.high:g}" if self.high < INFINITY else ""
        lower = lower if self.above is None else f"above {self.above:g}"
        upper = upper if self.below is None else f"below {self.below:g}"
        return ", ".join(filter(None, (lower, upper)))

    def violation(self, value: Any) -> str:
        """The rule that a value of the right type breaks, such as "must be above 0", or ""."""
        for item in value if self.is_list else [value]:
            if self.choices and item not in self.choices:
                return f"must be one of {', '.join(map(repr, self.choices))}"
            if isinstance(item, (int, float)) and not self._in_range(item):
                return f"must be {self.range or 'a number'}"
        return ""

    def _in_range(self, number: float) -> bool:
        return (
            self.low <= number <= self.high  # refuses NaN
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[object] = (),
    low: float = -INFINITY,
    high: float = INFINITY,
    above: float | None = None,
    below: float | None = None,
    iterations: bool = False,
    free: bool = False,
) -> Any:
    """A field of an options class; see `Option` for the arguments.

    Its type is the annotation's: bool, int, float, str, a Literal, which has the choices, or a list
    of one of them.
    """
    settings = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "above": above,
        "below": below,
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
    options = {}
    for item in dataclasses.fields(kind):
        if _METADATA not in item.metadata:
            raise TypeError(f"{kind.__name__}.{item.name} is not an option (make it by option())")
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc, operator]
        settings = dict(item.metadata[_METADATA])
        element, choices = _element(kind, item.name, hints[item.name])
        settings["choices"] = settings["choices"] or choices
        options[item.name.upper()] = Option(default, element=element, **settings)
    return options


def _element(kind: type, name: str, hint: Any) -> tuple[type, tuple[object, ...]]:
    """The type of a value, or of a list's elements, and the choices of a Literal."""
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        if typing.get_origin(hint) is list:  # anchor sizes: a list for each level
            return list, ()
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices
    if hint not in (bool, int, float, str):
        raise TypeError(f"{kind.__name__}.{name}: {hint} is not a type of options")
    return hint, ()


@dataclass(frozen=True)
class Options:
    """A base that refuses values out of range wherever its dataclass is made.

    Raises:
        ValueError: a value is out of range or no choice; the message names the field.

    Example:
        >>> @dataclass(frozen=True)
        ... class FocalOptions(Options):
        ...     gamma: float = option(1.0, "exponent of the modulating factor", low=0)
        >>> FocalOptions(gamma=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: gamma = -1.0 is not allowed (must be at least 0)
    """

    def __post_init__(self) -> None:
        for key, item in options_of(type(self)).items():
            name = key.lower()
            value = getattr(self, name)
            if rule := item.violation(value):
                raise ValueError(f"{name} = {value!r} is not allowed ({rule})")


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
    known: dict[str, Any] = {}
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
