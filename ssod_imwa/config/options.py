"""Options declared beside what reads them, and the configuration tree made of them.

A method, loss, detector or sampler has one frozen dataclass whose fields say everything about its
keys: default, meaning, range, choices. The tree, the checks, `docs/keys.md`, what `--scale` scales
and what a resume may change are made from these classes::

    @dataclass(frozen=True)
    class FocalOptions:
        gamma: float = option(1.0, "exponent of the modulating factor", low=0)

    # `sections.Section`
    SECTIONS = [Section("CLS.LOSS", FocalOptions, when={"CLS.LOSS.NAME": ("focal",)})]

Subclass `Options` to have values out of range refused in Python, too; a field may be an options
object itself, which makes a group of keys inside the group. A section is part of the tree only when
`when` holds, so a key of something that is not trained is not in the tree, and setting it is an
error that names what it belongs to. An option may have a `when` of its own, on fields beside it.
Values that no list can name are a `Switch`, such as `ABOVE_0`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, TypeVar

from fvcore.common.config import CfgNode

INFINITY = float("inf")
_METADATA = "option"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Switch:
    """The values of a key that switch something on, where they cannot be listed.

    Attributes:
        words: what these values are, after the name of the key: "above 0".
        is_on: whether a value is one of them; it may be of any type.
    """

    words: str
    is_on: Callable[[Any], bool]

    def __contains__(self, value: object) -> bool:
        return self.is_on(value)


OFF = Switch("False", lambda value: value is False)
ABOVE_0 = Switch("above 0", lambda value: isinstance(value, (int, float)) and value > 0)
BELOW_100 = Switch("below 100", lambda value: isinstance(value, (int, float)) and value < 100)
Values = tuple[object, ...] | Switch


def beginning_with(prefix: str) -> Switch:
    """The texts that begin with a prefix."""
    return Switch(
        f"beginning with {prefix!r}",
        lambda value: isinstance(value, str) and value.startswith(prefix),
    )


def other_than(switch: Switch) -> Switch:
    """All values but these."""
    return Switch(f"not {switch.words}", lambda value: value not in switch)


@dataclass(frozen=True)
class Option:
    """What a key is beside its name.

    Attributes:
        default: its value where nothing is set; lists are copied.
        help: one line: what it means, with its unit.
        element: type of the value, or of a list's elements (list for lists of lists, dict for
            lists of blocks of keys).
        choices: allowed values, of each element of a list; empty for any.
        low: smallest allowed value, of each element of a list.
        high: largest allowed value.
        above: a bound that is not allowed itself.
        below: a bound that is not allowed itself.
        iterations: whether it counts a member's own iterations, which `--scale` multiplies.
        decay: whether it is a moving average's decay an iteration, which `--scale-batch` takes to
            a power.
        free: whether it changes neither weights nor data order, so that a resume may change it.
        per_member: whether members may differ in it (IMWA.MEMBER_OVERRIDES).
        when: other options of its class, by the last parts of their keys, and the values at which
            it is read.
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
    decay: bool = False
    free: bool = False
    per_member: bool = False
    when: Mapping[str, Values] = field(default_factory=dict)

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
        if self.element is list and not all(map(_is_list_of_numbers, value)):
            return "must be lists of numbers"
        items = value if self.is_list else [value]
        for item in itertools.chain(*items) if self.element is list else items:
            if self.choices and item not in self.choices:
                return f"must be one of {', '.join(map(repr, self.choices))}"
            if isinstance(item, (int, float)) and not self._in_range(item):
                return f"must be {self.range if math.isfinite(item) else 'a finite number'}"
        return ""

    def _in_range(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and self.low <= number <= self.high
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def _is_list_of_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) in (int, float) for item in value)


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
    decay: bool = False,
    free: bool = False,
    per_member: bool = False,
    when: Mapping[str, Values] | None = None,
) -> Any:
    """A field of an options class; see `Option` for the arguments.

    Its type is the annotation's: bool, int, float, str, a Literal, which has the choices, or a list
    of one of them, of lists, or of blocks of keys (dict). `when` has names of fields that stand
    before it.
    """
    settings = {
        "help": help,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "iterations": iterations,
        "decay": decay,
        "free": free,
        "per_member": per_member,
        "when": {_leaf(name): values for name, values in (when or {}).items()},
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={_METADATA: settings})
    return field(default=default, metadata={_METADATA: settings})


@functools.cache
def options_of(kind: type) -> Mapping[str, Option]:
    """The options of a class by the last parts of their keys, in the order of its fields.

    Those of a group inside it have a dot: "RPN.NMS_THRESH".

    Raises:
        TypeError: a field is neither made by `option` nor an options object, or its annotation is
            not a type of options.
    """
    hints = typing.get_type_hints(kind)
    options = {}
    for item in dataclasses.fields(kind):
        name = _leaf(item.name)
        if _METADATA in item.metadata:
            settings = dict(item.metadata[_METADATA])
            element, choices = _element(kind, item.name, hints[item.name])
            settings["choices"] = settings["choices"] or choices
            options[name] = Option(_default(item), element=element, **settings)
        elif _is_group(hints[item.name]):
            for inner, entry in options_of(hints[item.name]).items():
                when = {f"{name}.{other}": values for other, values in entry.when.items()}
                options[f"{name}.{inner}"] = replace(entry, when=when)
        else:
            raise TypeError(f"{kind.__name__}.{item.name} is not an option (make it by option())")
    return options


def may_differ(kind: type) -> bool:
    """Whether members may differ in some option of a class."""
    return any(item.per_member for item in options_of(kind).values())


def _leaf(name: str) -> str:
    """The last part of a field's key; a word of Python, such as import, has an underscore."""
    return name.removesuffix("_").upper()


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _element(kind: type, name: str, hint: Any) -> tuple[type, tuple[object, ...]]:
    """The type of a value, or of a list's elements, and the choices of a Literal."""
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        if typing.get_origin(hint) is list:  # anchor sizes: a list for each level
            return list, ()
        if typing.get_origin(hint) is dict:  # settings of members: a block of keys for each
            return dict, ()
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
        options = options_of(type(self))  # type: ignore[arg-type]  # classes hash
        for field_ in dataclasses.fields(self):
            item = options.get(_leaf(field_.name))  # a group has none and has checked itself
            value = getattr(self, field_.name)
            if item is not None and (rule := item.violation(value)):
                raise ValueError(f"{field_.name} = {value!r} is not allowed ({rule})")


def read_options(kind: type[_T], node: CfgNode | None) -> _T:
    """An options object with the values of a configuration's node.

    Keys that are not in the tree, as they have no meaning for what is trained, have their defaults;
    so has all of it without a node.

    Example:
        >>> @dataclass(frozen=True)
        ... class FocalOptions(Options):
        ...     gamma: float = option(1.0, "exponent of the modulating factor", low=0)
        >>> read_options(FocalOptions, CfgNode({"GAMMA": 2.0}))
        FocalOptions(gamma=2.0)
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass, by contract
        key, hint = _leaf(item.name), hints[item.name]
        if node is not None and key in node:
            values[item.name] = read_options(hint, node[key]) if _is_group(hint) else node[key]
    return kind(**values)
