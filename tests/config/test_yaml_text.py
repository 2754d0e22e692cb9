import pytest

from ssod_imwa.config.yaml_text import parse_yaml
from ssod_imwa.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"^f\.yaml line 3: .*a stands twice, first in line 1"),
        ("x:\n  - {a: 1,\n     a: 1}", "line 3: .*a stands twice, first in line 2"),
        ("? [1]\n: 2", "line 1: .*unhashable"),
        ("a: !!python/object/apply:os.getcwd []", "line 1: .*could not determine a constructor"),
        ("\na: 2026-99-99", r"line 2: .*\('2026-99-99' is no timestamp\)"),
        ("a: !!int many", r"line 1: .*\('many' is no int\)"),
        ("a: !!bool many", r"line 1: .*\('many' is no bool\)"),
        ("a: !!set many", "line 1: .*expected a mapping node"),
        ("a: 0x" + "f" * 17, r"line 1: .*\(a number of more than 64 bits\)"),
        ("a: " + "9" * 5000, r"line 1: .*\('9{39} is no int\)"),
        ("[" * 1000, r"^f\.yaml: .*nested too deeply"),
        ("a:\n  \0", r"line 2: .*special characters are not allowed"),
        ("a: &a\n  b: *a", r"line 1: .*\(an alias stands inside itself\)"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "f.yaml")
    with pytest.raises(DataError):
        parse_yaml(text, "f.yaml", DataError)


@pytest.mark.parametrize("form", ["[{}]", "{{{}}}"])
def test_aliases_that_grow_without_end_are_refused(form):
    """Ten lines whose last stands for 10^9 values."""
    lines = ["a0: &a0 [x]"]
    for i in range(1, 10):
        aliases = [f"*a{i - 1}" if form == "[{}]" else f"k{j}: *a{i - 1}" for j in range(10)]
        lines.append(f"a{i}: &a{i} {form.format(', '.join(aliases))}")
    with pytest.raises(ConfigError, match=r"line 6: .*\(more than 100000 values\)"):
        parse_yaml("\n".join(lines), "f.yaml")


def test_an_alias_stands_for_what_it_names():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "f")["b"] == [[1, 2], [1, 2]]


def test_a_merged_mapping_may_be_overridden():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "f")["b"] == {"x": 3, "y": 2}
