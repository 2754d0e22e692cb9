"""Reads a configuration: YAML files with `_BASE_`, then KEY VALUE overrides, all checked.

Every error names the file (or the command line), the key, the value and what is allowed.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from ssod_imwa.config.defaults import CHOICES, ELEMENTS, RANGES, get_cfg
from ssod_imwa.config.naming import output_folder
from ssod_imwa.errors import ConfigError

BASE_KEY = "_BASE_"
TOOLKIT = "MODEL.TOOLKIT"
TOOLKIT_CONFIG = "MODEL.DETECTRON2.CONFIG"
COMMAND_LINE = "command line"


def load_config(
    paths: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> CfgNode:
    """The default configuration changed by YAML files and by KEY VALUE pairs, frozen.

    Args:
        paths: a YAML file, or several that are merged left to right; the `_BASE_` key of each names
            files, relative to itself, that are read before it. Unless one sets OUTPUT_DIR, it is
            made of their names: see `naming.output_folder`.
        overrides: alternating keys and values, such as `["SOLVER.MAX_ITER", "600"]`.

    Raises:
        ConfigError: a file is missing or no YAML, a key is unknown, a value is not allowed.

    Example:
        >>> load_config(overrides=["IMWA.MEMBERS", "2", "SOLVER.MAX_ITER", "600"]).IMWA.MEMBERS
        2
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    settings: list[tuple[str, Any, str]] = []
    if files:
        settings.append(("OUTPUT_DIR", output_folder(files), "names of the files"))
    for file in files:
        settings += [
            (key, value, source)
            for source, tree in _file_chain(file)
            for key, value in _leaves(tree)
        ]
    if len(overrides) % 2:
        raise ConfigError(
            f"{COMMAND_LINE}: overrides come as pairs KEY VALUE, but {overrides[-1]!r} stands alone"
        )
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        settings.append((key, _parse(text), COMMAND_LINE))
    cfg, foreign = _defaults(settings)
    for key, value, source in settings:
        _set(cfg, key, value, source, foreign)
    check_config(cfg, " + ".join(map(str, files)) or COMMAND_LINE)
    cfg.freeze()
    return cfg


def parse_config(text: str, source: str) -> CfgNode:
    """The configuration that `cfg.dump()` wrote, checked and frozen.

    Args:
        text: YAML of keys and values, without `_BASE_`.
        source: where it comes from, for errors.

    Raises:
        ConfigError: as `load_config`.
    """
    settings = [(key, value, source) for key, value in _leaves(_parse_yaml(text, source))]
    # A dump holds every key: the file that the detector was described by is not needed again.
    cfg, foreign = _defaults([item for item in settings if item[0] == TOOLKIT])
    for key, value, _ in settings:
        _set(cfg, key, value, source, foreign)
    check_config(cfg, source)
    cfg.freeze()
    return cfg


def check_config(cfg: CfgNode, source: str) -> None:
    """Rules that tie several keys together; `source` is named in their errors.

    Raises:
        ConfigError: a rule is broken; the message holds the values on both sides.
    """
    solver, imwa = cfg.SOLVER, cfg.IMWA
    if not cfg.OUTPUT_DIR:  # an unset shell variable; Path("") is the current folder
        raise ConfigError(f"{source}: OUTPUT_DIR = '' is not allowed (must name a folder)")
    if imwa.EPISODES > solver.MAX_ITER:
        raise ConfigError(
            f"{source}: IMWA.EPISODES = {imwa.EPISODES} is not allowed "
            f"(must be 1..SOLVER.MAX_ITER = {solver.MAX_ITER})"
        )
    for key in ("IMS_PER_BATCH", "IMS_PER_BATCH_UNLABELED"):
        if solver[key] % solver.ACCUMULATION_STEPS:
            raise ConfigError(
                f"{source}: SOLVER.{key} = {solver[key]} is not allowed "
                f"(must be a multiple of SOLVER.ACCUMULATION_STEPS = {solver.ACCUMULATION_STEPS})"
            )
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise ConfigError(
            f"{source}: SOLVER.STEPS = {list(solver.STEPS)} is not allowed (must increase)"
        )
    if imwa.COEFFICIENTS and len(imwa.COEFFICIENTS) != imwa.MEMBERS:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS has {len(imwa.COEFFICIENTS)} values for IMWA.MEMBERS = "
            f"{imwa.MEMBERS} (must be one a member, or none for equal weights)"
        )
    if imwa.COEFFICIENTS and abs(sum(imwa.COEFFICIENTS) - 1) > 1e-6:
        raise ConfigError(
            f"{source}: IMWA.COEFFICIENTS sum to {sum(imwa.COEFFICIENTS):g} (must be 1 within 1e-6)"
        )


def keys(cfg: CfgNode) -> list[str]:
    """The full names of all keys of a configuration, such as "SOLVER.MAX_ITER"."""
    return [key for key, _ in _leaves(cfg)]


def _file_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The files a YAML file stands on, bases first, each with its own content."""
    if path in seen:
        raise ConfigError(f"{path}: {BASE_KEY} leads back to the file itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named = f" ({BASE_KEY} of {seen[-1]})" if seen else ""
        raise ConfigError(f"{path}{named}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a text file") from error
    tree = _parse_yaml(text, str(path))
    bases = tree.pop(BASE_KEY, [])
    chain = []
    for base in [bases] if isinstance(bases, str) else bases:
        chain += _file_chain(path.parent / Path(base).expanduser(), (*seen, path))
    return [*chain, (str(path), tree)]


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{source}{line}: is not valid YAML ({problem})") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must hold keys and values, not a {type(tree).__name__}")
    return tree


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
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _defaults(settings: Sequence[tuple[str, Any, str]]) -> tuple[CfgNode, frozenset[str]]:
    """The tree that the settings change, and its keys that follow detectron2's rules, not ours."""
    last = {key: value for key, value, _ in settings}
    if last.get(TOOLKIT) != "detectron2":
        return get_cfg(), frozenset()
    try:
        from ssod_imwa.integrations.detectron2.config import foreign_keys, toolkit_config
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ConfigError(
            f"{TOOLKIT} = 'detectron2': detectron2 is not installed (see docs/detectron2.md, or "
            "choose torchvision)"
        ) from None
    return toolkit_config(str(last.get(TOOLKIT_CONFIG, ""))), foreign_keys()


def _set(cfg: CfgNode, key: str, value: Any, source: str, foreign: frozenset[str]) -> None:
    known = keys(cfg)
    if key not in known:
        raise ConfigError(f"{source}: {key} is not a configuration key{_suggestion(key, known)}")
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    if key in foreign:
        _merge(cfg, key, value, node[leaf], source)
        return
    value = _coerce(key, value, node[leaf], source)
    _check_value(key, value, source)
    node[leaf] = value


def _merge(cfg: CfgNode, key: str, value: Any, default: Any, source: str) -> None:
    """Set a key of detectron2 by its own rules; whole numbers and 1e-3 are numbers there, too."""
    if isinstance(default, float):
        value = _coerce_scalar(key, value, float, source)
    try:
        cfg.merge_from_list([key, value])
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{source}: {key} = {value!r} is not allowed ({error})") from error


def _suggestion(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f" but a group of keys: {', '.join(inside)}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    # A right name in the wrong group: MAX_ITER for SOLVER.MAX_ITER.
    same = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    found = (same or close)[:1]
    return f"; did you mean {found[0]}?" if found else ""


def _coerce(key: str, value: Any, default: Any, source: str) -> Any:
    """The value in the type of the key's default, or an error."""
    if isinstance(default, list):
        if isinstance(value, str):  # detectron2's YAML files write (60000, 80000)
            value = _parse(value)
        if not isinstance(value, (list, tuple)):
            raise _wrong(key, value, "must be a list, such as [a, b]", source)
        element = ELEMENTS.get(key) or type(default[0])
        if element is list:
            return [list(inner) if isinstance(inner, (list, tuple)) else inner for inner in value]
        return [_coerce_scalar(key, item, element, source) for item in value]
    return _coerce_scalar(key, value, type(default), source)


def _coerce_scalar(key: str, value: Any, wanted: type, source: str) -> Any:
    if wanted is float and isinstance(value, str):  # YAML reads 1e-3, without a dot, as a text
        try:
            value = float(value)
        except ValueError:
            raise _wrong(key, value, "must be a number", source) from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not wanted:
        names = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}
        raise _wrong(key, value, f"must be {names[wanted]}", source)
    return value


def _check_value(key: str, value: Any, source: str) -> None:
    if key in CHOICES and value not in CHOICES[key]:
        allowed = ", ".join(map(repr, CHOICES[key]))
        close = difflib.get_close_matches(str(value), map(str, CHOICES[key]), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise _wrong(key, value, f"must be one of {allowed}", source, hint)
    if key in RANGES:
        low, high = RANGES[key]
        for number in value if isinstance(value, list) else [value]:
            if not low <= number <= high:  # also refuses NaN
                limit = f"at least {low:g}" if high == float("inf") else f"{low:g}..{high:g}"
                raise _wrong(key, value, f"must be {limit}", source)


def _wrong(key: str, value: Any, rule: str, source: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{source}: {key} = {value!r} is not allowed ({rule}){hint}")
