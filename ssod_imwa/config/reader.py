"""Reads a configuration: YAML files with `_BASE_`, then KEY VALUE overrides, all checked.

It knows sections of options and nothing of what is in them. Every error names the file (or the
command line), the key, the value and what is allowed.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from fvcore.common.config import CfgNode

from ssod_imwa.config.options import Option
from ssod_imwa.config.sections import (
    Section,
    active_sections,
    build_tree,
    options_by_key,
    why_inactive,
)
from ssod_imwa.config.yaml_text import parse_yaml
from ssod_imwa.errors import ConfigError

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
_SHOWN = 200  # characters of a value
COMMAND_LINE = "command line"
_LISTS = {
    str: "['a', 'b']",
    int: "[1, 2]",
    float: "[0.1, 0.2]",
    bool: "[True, False]",
    list: "[[1, 2], [3]]",
    dict: "[{}, {}]",
}


@dataclass(frozen=True)
class Setting:
    """A key in full, a value, and where it is set.

    Attributes:
        typed: the value as it was typed on a command line, None if it was not.
    """

    key: str
    value: Any
    source: str
    typed: str | None = None


def file_settings(path: Path) -> list[Setting]:
    """What a YAML file sets; its `_BASE_` key names files, relative to itself, that come first.

    Raises:
        ConfigError: a file is missing or no YAML.
    """
    return [setting for source, tree in _file_chain(path) for setting in _settings(tree, source)]


def text_settings(text: str, source: str) -> list[Setting]:
    """What a YAML text without `_BASE_` sets.

    Raises:
        ConfigError: it is no YAML.
    """
    return _settings(_parse_tree(text, source), source)


def override_settings(overrides: Sequence[str]) -> list[Setting]:
    """What alternating keys and values, such as `["SOLVER.MAX_ITER", "600"]`, set.

    Raises:
        ConfigError: a key has no value.
    """
    if len(overrides) % 2:
        raise ConfigError(
            f"{COMMAND_LINE}: overrides come as pairs KEY VALUE, but {overrides[-1]!r} stands alone"
        )
    pairs = zip(overrides[::2], overrides[1::2], strict=True)
    return [Setting(key, _parse(text), COMMAND_LINE, typed=text) for key, text in pairs]


def build_config(
    sections: Sequence[Section], settings: Sequence[Setting], *, toolkit: CfgNode | None = None
) -> CfgNode:
    """The defaults of the sections that settings choose, changed by them; later ones win.

    A setting without meaning is refused, unless it had one before a later file or the command line
    took it, as SOLVER.OPTIMIZER AdamW does from a recipe's SOLVER.NESTEROV: then it is left out,
    and the log says so.

    Args:
        sections: all that there are; see `options.active_sections`.
        settings: in order.
        toolkit: the tree of another package, which its own rules check; where both have a key that
            is read, it is ours.

    Raises:
        ConfigError: a key is unknown or has no meaning here, or a value is not allowed.
    """
    active = active_sections(sections, _choices(sections, settings))
    options = options_by_key(active)
    tree = build_tree(active)
    foreign = frozenset() if toolkit is None else frozenset(keys(toolkit)) - options.keys()
    if toolkit is not None:
        tree = _merged(toolkit.clone(), tree)
    # Values first: a misspelled method would make all its keys look foreign.
    for setting in settings:
        if setting.key in options:
            set_value(tree, setting.key, _checked(setting, options[setting.key]))
    for number, setting in enumerate(settings):
        if setting.key in foreign:
            _set_foreign(tree, setting)
        elif setting.key not in options:
            _check_left_out(sections, tree, foreign, settings, number)
    return tree


def changed_config(
    sections: Sequence[Section], cfg: CfgNode, settings: Sequence[Setting]
) -> CfgNode:
    """A copy of a configuration with some keys changed, not frozen.

    Keys that have no meaning with the changes, as those of another sampler, are left out.

    Args:
        sections: as for `build_config`.
        cfg: made by it.
        settings: what is changed.

    Raises:
        ConfigError: as `build_config`.
    """
    values = {key: value_of(cfg, key) for key in keys(cfg)}
    # A toolkit may have keys that we declare for other toolkits.
    ours = options_by_key(active_sections(sections, values))
    toolkit = without(cfg, ours) if values.keys() - ours.keys() else None
    base = [Setting(key, value, "") for key, value in values.items() if key in ours]
    active = options_by_key(active_sections(sections, _choices(sections, [*base, *settings])))
    remaining = [setting for setting in base if setting.key in active]
    return build_config(sections, [*remaining, *settings], toolkit=toolkit)


def without(cfg: CfgNode, removed: Container[str]) -> CfgNode:
    """A copy without some keys, which are named in full, not frozen."""
    copy = cfg.clone()
    copy.defrost()
    for key in keys(cfg):
        if key in removed:
            group, _, leaf = key.rpartition(".")
            del (value_of(copy, group) if group else copy)[leaf]
    return copy


def _choices(sections: Sequence[Section], settings: Sequence[Setting]) -> dict[str, Any]:
    """What is set, in the types of the keys where that is possible; `_checked` refuses the rest."""
    declared = options_by_key(sections)
    values = {}
    for setting in settings:
        values[setting.key] = setting.value
        if setting.key in declared:
            with contextlib.suppress(ConfigError):
                values[setting.key] = _coerce(setting, declared[setting.key])
    return values


def keys(cfg: CfgNode) -> list[str]:
    """The full names of all keys of a configuration, such as "SOLVER.MAX_ITER"."""
    return [key for key, _ in _leaves(cfg)]


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a key, given its full name.

    Raises:
        KeyError: there is none.
    """
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def set_value(cfg: CfgNode, key: str, value: Any) -> None:
    """Set the value of a key that is there, given its full name; the tree must not be frozen."""
    group, _, leaf = key.rpartition(".")
    (value_of(cfg, group) if group else cfg)[leaf] = value


def _merged(cfg: CfgNode, ours: CfgNode) -> CfgNode:
    """A toolkit's tree with our keys in it."""
    for key, value in ours.items():
        if isinstance(value, CfgNode):
            value = _merged(cfg.setdefault(key, type(cfg)()), value)
        cfg[key] = value
    return cfg


def _set_foreign(cfg: CfgNode, setting: Setting) -> None:
    """Set a toolkit's key by its own rules; whole numbers and 1e-3 are numbers there, too."""
    value = setting.value
    if isinstance(value_of(cfg, setting.key), float):
        value = _coerce_scalar(setting, value, float)
    try:
        cfg.merge_from_list([setting.key, value])
    except (ValueError, AssertionError) as error:
        raise _wrong(setting, value, str(error)) from error


def _check_left_out(
    sections: Sequence[Section],
    cfg: CfgNode,
    foreign: frozenset[str],
    settings: Sequence[Setting],
    number: int,
) -> None:
    """Refuse the setting of a number, which has no meaning, unless it had one at a file's end.

    Raises:
        ConfigError: the key is unknown or has no meaning here.
    """
    setting, later = settings[number], settings[number + 1 :]
    declared = options_by_key(sections)
    if setting.key not in declared:
        known = [*declared, *sorted(foreign)]
        reason = f"is not a configuration key{_suggestion(setting.key, known)}"
        raise ConfigError(f"{setting.source}: {setting.key} {reason}")
    reason = why_inactive(sections, setting.key, {key: value_of(cfg, key) for key in keys(cfg)})
    pairs = enumerate(pairwise(settings[number:]), start=number + 1)
    ends = [end for end, (one, next_one) in pairs if one.source != next_one.source]
    if not any(_has_meaning(sections, setting.key, settings[:end]) for end in ends):
        raise ConfigError(f"{setting.source}: {setting.key} {reason}")
    if all(other.key != setting.key for other in later):  # once for each key
        logger.warning("%s: %s is left out: it %s", setting.source, setting.key, reason)


def _has_meaning(sections: Sequence[Section], key: str, settings: Sequence[Setting]) -> bool:
    return key in options_by_key(active_sections(sections, _choices(sections, settings)))


def _suggestion(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f" but a group of keys: {', '.join(inside)}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    # A right name in the wrong group: MAX_ITER for SOLVER.MAX_ITER.
    same = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    best = (same or close)[:1]
    return f"; did you mean {best[0]}?" if best else ""


def _file_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The files a YAML file stands on, bases first, each with its own content."""
    if os.path.realpath(path) in map(os.path.realpath, seen):
        raise ConfigError(f"{seen[-1]}: {BASE_KEY} leads back to the file itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named = f" ({BASE_KEY} of {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}{named}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    tree = _parse_tree(text, str(path))
    chain = []
    for base in _bases(tree.pop(BASE_KEY, []), path):
        chain += _file_chain(path.parent / os.path.expanduser(base), (*seen, path))
    return [*chain, (str(path), tree)]


def _bases(value: Any, path: Path) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(map(fits_a_file, names)):
        rule = "must be the name of a YAML file, or a list of names"
        raise ConfigError(f"{path}: {BASE_KEY} = {_shown(value)} is not allowed ({rule})")
    return names


def _parse_tree(text: str, source: str) -> dict[str, Any]:
    tree = parse_yaml(text, source)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must hold keys and values, not a {type(tree).__name__}")
    return tree


def _settings(tree: Mapping[str, Any], source: str) -> list[Setting]:
    settings = {}
    for key, value in _leaves(tree):
        if key in settings:  # as SOLVER.BASE_LR and as BASE_LR below SOLVER
            raise ConfigError(f"{source}: {key} stands twice (one of the two would be lost)")
        settings[key] = Setting(key, value, source)
    return list(settings.values())


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _parse(text: str) -> Any:
    """A command line's value: a Python literal if it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # see its manual
        return {"true": True, "false": False}.get(text.lower(), text)


def _checked(setting: Setting, option: Option) -> Any:
    """The value in the type of the key, if the option allows it."""
    value = _coerce(setting, option)
    if rule := option.violation(value):
        close = difflib.get_close_matches(str(value), list(map(str, option.choices)), n=1)
        raise _wrong(setting, value, rule, f"; did you mean {close[0]!r}?" if close else "")
    return value


def _coerce(setting: Setting, option: Option) -> Any:
    value = setting.value
    if not option.is_list:
        return _coerce_scalar(setting, value, option.element)
    if isinstance(value, str) and option.element is dict:
        value = parse_yaml(value, setting.source)
    elif isinstance(value, str):  # detectron2's YAML files write (60000, 80000)
        value = _parse(value)
    if not isinstance(value, (list, tuple)):
        # Quoted: a command line has no other texts in lists.
        raise _wrong(setting, value, f"must be a list, such as {_LISTS[option.element]}")
    if option.element is dict:
        return [_coerce_block(setting, block) for block in value]
    if option.element is list:  # which `violation` looks into
        return [list(inner) if isinstance(inner, (list, tuple)) else inner for inner in value]
    return [_coerce_scalar(setting, item, option.element) for item in value]


def _coerce_block(setting: Setting, block: Any) -> dict[str, Any]:
    """A block of keys by their full names, whether they stand in groups or not."""
    if not isinstance(block, Mapping) or not all(isinstance(key, str) for key in block):
        rule = "must be a list of blocks of keys, such as [{}, {SOLVER: {BASE_LR: 0.02}}]"
        raise _wrong(setting, block, rule)
    return {one.key: one.value for one in _settings(block, f"{setting.source}: {setting.key}")}


def _coerce_scalar(setting: Setting, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, str):  # YAML reads 1e-3, without a dot, as a text
        try:
            value = float(value)
        except ValueError:
            raise _wrong(setting, value, "must be a number") from None
    if wanted in (int, float) and type(value) is int and not -(2**63) <= value < 2**63:
        raise _wrong(setting, value, "must have at most 64 bits")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        # A folder 2026_11_27 is not 20261127.
        return setting.typed if setting.typed and value is setting.value else str(value)
    if type(value) is not wanted:
        names = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}
        raise _wrong(setting, value, f"must be {names[wanted]}")
    if wanted is str and not fits_a_file(value):
        raise _wrong(setting, value, "must be a text that a file can hold")
    return value


def fits_a_file(value: object) -> TypeGuard[str]:
    """Whether a value is a text that a file can hold: no byte of 0, no half of a character."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character, or a name on disk that is not UTF-8
        return False
    return True


def _wrong(setting: Setting, value: Any, rule: str, hint: str = "") -> ConfigError:
    return ConfigError(
        f"{setting.source}: {setting.key} = {_shown(value)} is not allowed ({rule}){hint}"
    )


def _shown(value: Any) -> str:
    """A value for a message, without the middle if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"
