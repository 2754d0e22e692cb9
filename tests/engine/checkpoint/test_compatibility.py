from ssod_imwa.engine.checkpoint import compatibility
from ssod_imwa.engine.checkpoint.compatibility import changes, identity, in_words


def test_every_entry_is_compared_but_those_for_the_reader():
    saved = {"T": 10, "seed": 1, "batch": (2, 4), "config": "A: 1"}
    current = {"T": 10, "seed": 2, "batch": (2, 8), "config": "A: 2", "stored_size": 32}
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


def test_changes_are_one_line_with_both_values():
    changed = changes({"T": 10, "batch": 2}, {"T": 2000, "batch": 16})
    assert in_words(changed) == "T (saved 10, now 2000), batch (saved 2, now 16)"
