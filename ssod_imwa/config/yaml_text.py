"""YAML as all our files are read: safe types alone, no key twice, no number or size without end."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from ssod_imwa.errors import ConfigError, UserError

_MERGE = "tag:yaml.org,2002:merge"

# A table of a paper has some 2,000. A file of a page whose aliases name each other has billions.
_MAX_VALUES = 100_000


def parse_yaml(text: str, source: str, error: type[UserError] = ConfigError) -> Any:
    """The content of a YAML text.

    Args:
        text: what was read.
        source: where from, for messages.
        error: what is raised.

    Raises:
        UserError: it is no YAML, a mapping has one key twice, or it holds more than any file of
            ours; the message names the line where there is one.

    Example:
        >>> parse_yaml("SEED: 1", "a.yaml")
        {'SEED': 1}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as reason:
        raise error(f"{source}: is not valid YAML (it is nested too deeply)") from reason
    except yaml.reader.ReaderError as reason:
        line = text.count("\n", 0, reason.position) + 1
        raise error(f"{source} line {line}: is not valid YAML ({reason.reason})") from reason
    except yaml.YAMLError as reason:
        mark = getattr(reason, "problem_mark", None)
        line_of_mark = f" line {mark.line + 1}" if mark else ""
        problem = getattr(reason, "problem", None) or reason
        raise error(f"{source}{line_of_mark}: is not valid YAML ({problem})") from reason


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first value would be lost."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None:
            self._count(root, {})
        return root

    def _count(self, node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
        """Values in a node once its aliases are written out; 0 in `counts` while it is counted."""
        if node not in counts:
            counts[node] = 0
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = (child if isinstance(child, tuple) else (child,) for child in children)
            counts[node] = 1 + sum(self._count(child, counts) for pair in pairs for child in pair)
        if not 0 < counts[node] <= _MAX_VALUES:
            many = f"more than {_MAX_VALUES} values"
            problem = many if counts[node] else "an alias stands inside itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return counts[node]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError) as reason:
            # Of PyYAML's own readers of numbers and dates: 2026-99-99, !!int abc.
            problem = f"{node.value!r:.40} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from reason
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            problem = "a number of more than 64 bits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Hashable, int] = {}
        # Of `!!set text` the base class says what is wrong.
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = None if key.tag == _MERGE else self.construct_object(key, deep=True)
            if name is None or not isinstance(name, Hashable):
                continue  # what cannot be a key is refused below
            if name in lines:
                problem = f"{name} stands twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)
