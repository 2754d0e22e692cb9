from types import SimpleNamespace

from ssod_imwa.task import evaluate_sets


def test_metrics_of_several_sets_are_told_apart_by_their_names():
    day, night = (SimpleNamespace(name=name, value=x) for name, x in (("day", 1.0), ("night", 2.0)))
    assert evaluate_sets([day], lambda test: {"AP": test.value}) == {"AP": 1.0}
    assert evaluate_sets([day, night], lambda test: {"AP": test.value}) == {
        "day/AP": 1.0,
        "night/AP": 2.0,
    }
