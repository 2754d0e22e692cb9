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
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "f.yaml")
    with pytest.raises(DataError):
        parse_yaml(text, "f.yaml", DataError)


def test_a_merged_mapping_may_be_overridden():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "f")["b"] == {"x": 3, "y": 2}
