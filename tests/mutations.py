"""Mutated files for property tests of the readers, and what has to come of reading each of them."""

import contextlib
import json
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ssod_imwa.errors import UserError

# The same files in every normal run; the long profile, which is `slow`, draws new ones each time.
SHORT = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(SHORT, max_examples=800, derandomize=False)
both_profiles = pytest.mark.parametrize(
    "profile", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)

LIMIT = 2 << 30  # bytes that reading a file may take

_NUMBERS = [-1, 0, 0.5, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf")]
_TEXTS = ["", " ", "1", "true", "64.0", "../../x", "a\x00b", "\ud800", "\x1b[31m", "x" * 300]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(_NUMBERS)
    | st.text(max_size=8)
    | st.sampled_from(_TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)


@contextlib.contextmanager
def limited_memory(limit=LIMIT):
    """Inside, the process cannot get more than `limit` bytes beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def places(tree, path=()):
    """Paths to all values of a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def trees(draw, tree):
    """A tree with one to three values replaced, taken out, doubled or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree)) or [()]))
        if not path:
            break
        node = tree
        for key in path[:-1]:
            node = node[key]
        _change(draw, node, path[-1])
    return tree


def _change(draw, node, key):
    change = draw(st.sampled_from(["replace", "replace", "delete", "add", "swap"]))
    if change == "delete":
        del node[key]
    elif change == "swap":  # the value of a neighbor
        others = list(node) if isinstance(node, dict) else range(len(node))
        node[key] = node[draw(st.sampled_from(list(others)))]
    elif change == "replace":
        node[key] = draw(VALUES)
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[draw(st.text(max_size=3))] = draw(VALUES)


@st.composite
def damaged(draw, content):
    """Bytes that are cut off, have a part doubled, taken out or replaced, or another encoding."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    part = content[start:end]
    junk = draw(
        st.binary(max_size=4) | st.sampled_from([b"\x00", b"\xff\xfe", b" " * 50, b"1" * 9])
    )
    how = draw(st.sampled_from(["whole", "cut", "double", "take out", "junk", "encode"]))
    if how == "encode":
        encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-be", "latin-1", "cp500"]))
        return content.decode("utf-8", "replace").encode(encoding, "replace")
    return {
        "whole": content,
        "cut": content[:start],
        "double": content[:end] + part + content[end:],
        "take out": content[:start] + content[end:],
        "junk": content[:start] + junk + content[start:],
    }[how]


def as_json(tree):
    return json.dumps(tree).encode()


def outcome(read, *names):
    """What reading gives; None where it ends in one line that names one of the files."""
    try:
        return read()
    except UserError as error:
        message = str(error)
    assert message.isprintable(), ascii(message)
    assert any(name in message for name in names), message
    return None
