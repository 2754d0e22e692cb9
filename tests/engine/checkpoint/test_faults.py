import io

import pytest

from ssod_imwa.engine.checkpoint import faults


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(faults, "_reached", {})
    monkeypatch.delenv(faults.VARIABLE, raising=False)


def test_nothing_happens_without_the_variable_or_at_other_points(monkeypatch):
    faults.reach("write:open")
    monkeypatch.setenv(faults.VARIABLE, "write:open=fail")
    faults.reach("write:fsync")


def test_fails_the_nth_time_only(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "retention=fail@2")
    faults.reach("retention")
    with pytest.raises(OSError, match="no space left, as asked by SSOD_IMWA_FAULT at retention"):
        faults.reach("retention")
    faults.reach("retention")


def test_unknown_action_is_an_error(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "retention=explode")
    with pytest.raises(ValueError, match="'explode' is not allowed"):
        faults.reach("retention")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 7])
def test_tearing_writes_exactly_so_many_bytes_first(monkeypatch, count):
    monkeypatch.setenv(faults.VARIABLE, f"write:{count}=fail")
    file = io.BytesIO()
    torn = faults.tearing(file, "write")
    with pytest.raises(OSError, match="no space left"):
        list(map(torn.write, (b"01", b"", b"234", b"567")))
    assert file.getvalue() == b"01234567"[:count]


def test_tearing_leaves_files_of_other_kinds_and_points_alone(monkeypatch):
    file = io.BytesIO()
    assert faults.tearing(file, "write") is file
    for fault in ("write:1=kill", "pointer:fsync=kill"):
        monkeypatch.setenv(faults.VARIABLE, fault)
        assert faults.tearing(file, "pointer") is file
