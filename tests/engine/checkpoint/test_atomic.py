import hashlib
import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from ssod_imwa.engine.checkpoint import atomic, faults
from ssod_imwa.engine.checkpoint.atomic import (
    WriteError,
    damage,
    digest_path,
    load_checkpoint,
    remove_checkpoint,
    remove_stale_temporaries,
    write_checkpoint,
    write_output,
)
from ssod_imwa.engine.checkpoint.lock import STALE_SECONDS
from ssod_imwa.errors import CheckpointError, OutputError

VALUE = {"weights": torch.arange(1000.0), "step": 3}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "_reached", {})
    path = tmp_path / "model.pth"
    write_checkpoint(path, VALUE)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_written_file_is_described_and_loads(path):
    assert damage(path) is None
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3
    assert torch.equal(loaded["weights"], VALUE["weights"])
    described = json.loads(digest_path(path).read_text())
    content = path.read_bytes()
    assert described["bytes"] == len(content)
    assert described["sha256"] == hashlib.sha256(content).hexdigest()
    assert names(path.parent) == ["model.pth", "model.pth.json"]


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99, -1])
def test_truncation_is_found(path, kept):
    size = path.stat().st_size
    os.truncate(path, size - 1 if kept < 0 else int(kept * size))
    assert f"instead of {size}" in damage(path)


def test_every_flipped_bit_is_found(path):
    content = path.read_bytes()
    bits = random.Random(1)
    for _ in range(100):
        flipped = bytearray(content)
        flipped[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        path.write_bytes(flipped)
        assert "SHA-256 is" in damage(path)
    path.write_bytes(content)
    assert damage(path) is None


def test_missing_and_foreign_files_are_damage(path):
    digest = digest_path(path).read_text()
    for content in ("", "[]", "{}", digest.replace("sha256", "md5"), "\0"):
        digest_path(path).write_text(content)
        assert "cannot be read" in damage(path)
    digest_path(path).unlink()
    assert "model.pth.json does not exist" in damage(path)
    path.unlink()
    assert damage(path) == "it does not exist"
    path.mkdir()
    assert damage(path) == "it is not a file"


@pytest.mark.parametrize(
    "point",
    ["open", "0", "1", "3000", "fsync", "replace"]
    + [f"digest:{point}" for point in ("open", "0", "50", "fsync", "replace")],
)
@pytest.mark.parametrize("before", ["intact", "damaged", "absent"])
def test_failed_write_keeps_the_old_content_and_no_temporary(path, point, before, monkeypatch):
    if before == "damaged":
        path.write_bytes(b"damaged")
    if before == "absent":
        remove_checkpoint(path)
    point = point if ":" in point else f"write:{point}"
    monkeypatch.setenv(faults.VARIABLE, f"{point}=fail")
    with pytest.raises(WriteError, match=r"model.pth could not be written: .*no space left"):
        write_checkpoint(path, {"weights": torch.ones(2000)})
    assert not list(path.parent.glob("*.tmp.*"))
    if before == "intact":
        assert damage(path) is None
        assert load_checkpoint(path)["step"] == 3
    else:
        assert damage(path) is not None
    monkeypatch.delenv(faults.VARIABLE)
    write_checkpoint(path, {"step": 4})
    assert damage(path) is None
    assert load_checkpoint(path) == {"step": 4}


def test_disk_that_changes_bytes_is_found_before_the_file_gets_its_name(path, monkeypatch):
    measure = atomic._measure
    monkeypatch.setattr(atomic, "_measure", lambda p: {**measure(p), "sha256": "0" * 64})
    with pytest.raises(WriteError, match="what was read back is not what was written"):
        write_checkpoint(path.with_name("other.pth"), VALUE)
    assert names(path.parent) == ["model.pth", "model.pth.json"]


def test_missing_directory_is_a_write_error(tmp_path):
    with pytest.raises(WriteError, match=r"gone.*could not be written"):
        write_checkpoint(tmp_path / "gone" / "model.pth", VALUE)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"step": Marker(tmp_path / "marker")}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model.pth cannot be loaded: Weights only"):
        load_checkpoint(tmp_path / "model.pth")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert (tmp_path / "marker").exists(), "the file would not have created the marker anyway"


def test_removal_takes_the_digest_along_and_tolerates_absence(path):
    remove_checkpoint(path)
    remove_checkpoint(path)
    assert names(path.parent) == []


def test_failing_removal_is_logged(path, monkeypatch, caplog):
    monkeypatch.setenv(faults.VARIABLE, "retention=fail")
    remove_checkpoint(path)
    assert "could not be removed" in caplog.text
    assert damage(path) is None


def test_temporaries_of_dead_processes_are_removed_whatever_their_age(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    old = time.time() - STALE_SECONDS - 1
    here, elsewhere = atomic._host(), "0" * 8
    times = {
        f"dead.pth.tmp.{here}.{child.pid}": time.time(),
        f"old_elsewhere.pth.tmp.{elsewhere}.{os.getpid()}": old,
        f"alive.pth.tmp.{here}.{os.getpid()}": old,
        f"new_elsewhere.pth.tmp.{elsewhere}.{child.pid}": time.time(),
        "notes.tmp.txt": old,
    }
    for name, changed in times.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (changed, changed))
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == sorted(list(times)[2:])


def test_an_output_is_there_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "page.html"
    write_output(path, b"first")
    monkeypatch.setattr(faults, "_reached", {})
    monkeypatch.setenv(faults.VARIABLE, "output:3=fail")
    with pytest.raises(OutputError, match=r"page.html cannot be written: no space left"):
        write_output(path, b"second")
    assert (path.read_bytes(), names(path.parent)) == (b"first", ["page.html"])
