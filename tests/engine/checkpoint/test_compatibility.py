from ssod_imwa.engine.checkpoint import compatibility
from ssod_imwa.engine.checkpoint.compatibility import changes, identity, table


def test_every_entry_is_compared_but_the_config_text():
    saved = {"T": 10, "seed": 1, "batch": (2, 4), "config": "A: 1"}
    current = {"T": 10, "seed": 2, "batch": (2, 8), "config": "A: 2"}
    assert changes(saved, saved) == []
    assert changes(saved, current) == [("batch", (2, 4), (2, 8)), ("seed", 1, 2)]


def test_entries_of_one_side_only_are_changes():
    assert changes({"a": None}, {"b": 1}) == [("a", None, "(absent)"), ("b", "(absent)", 1)]


def test_major_version_belongs_to_the_identity(monkeypatch):
    saved = identity({"T": 1})
    monkeypatch.setattr(compatibility, "__version__", "0.99.7")
    assert changes(saved, identity({"T": 1})) == []
    monkeypatch.setattr(compatibility, "__version__", "1.0.0")
    assert changes(saved, identity({"T": 1})) == [("library major version", 0, 1)]


def test_table_aligns_key_saved_and_current():
    assert table(changes({"T": 10, "batch": 2}, {"T": 2000, "batch": 16})).splitlines() == [
        "  key    saved  current",
        "  T      10     2000",
        "  batch  2      16",
    ]
