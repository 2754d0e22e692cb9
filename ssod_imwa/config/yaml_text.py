"""YAML as all our files are read: safe types alone, and no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ssod_imwa.errors import ConfigError, UserError

_MERGE = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, source: str, error: type[UserError] = ConfigError) -> Any:
    """The content of a YAML text.

    Args:
        text: what was read.
        source: where from, for messages.
        error: what is raised.

    Raises:
        UserError: it is no YAML, or a mapping has one key twice; the message names the line.

    Example:
        >>> parse_yaml("SEED: 1", "a.yaml")
        {'SEED': 1}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as reason:
        mark = getattr(reason, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(reason, "problem", None) or reason
        raise error(f"{source}{line}: is not valid YAML ({problem})") from reason


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            name = None if key.tag == _MERGE else self.construct_object(key, deep=True)
            if name is None or not isinstance(name, Hashable):
                continue  # what cannot be a key is refused below
            if name in lines:
                problem = f"{name} stands twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)
