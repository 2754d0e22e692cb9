import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ssod_imwa.engine.checkpoint import lock as run_lock
from ssod_imwa.engine.checkpoint.lock import RunLock, process_is_alive
from ssod_imwa.errors import CheckpointError


@pytest.fixture
def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def write_lock(folder, **owner):
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": None} | owner
    (folder / "run.lock").write_text(json.dumps(owner))


def test_second_run_is_refused_until_the_first_releases(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "):
        RunLock(tmp_path)
    lock.release()
    assert not (tmp_path / "run.lock").exists()
    RunLock(tmp_path).release()


def test_a_lock_that_is_not_held_in_the_end_leaves_no_file(tmp_path, monkeypatch):
    """A signal that raises SystemExit may come at any line."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: sys.exit(143))
    with pytest.raises(SystemExit):
        RunLock(tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_a_process_that_ends_at_once_abandons_its_lock_but_not_another_ones(tmp_path):
    lock = RunLock(tmp_path)
    lock.abandon()
    assert not (tmp_path / "run.lock").exists()
    write_lock(tmp_path, host="elsewhere")
    lock.abandon()
    lock.release()
    assert (tmp_path / "run.lock").exists()


def test_lock_of_a_dead_process_is_taken_over_with_a_warning(tmp_path, dead_pid, caplog):
    write_lock(tmp_path, pid=dead_pid)
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert f"taking over {lock.path} from process {dead_pid} on " in caplog.text


def test_lock_whose_process_number_was_given_to_another_process_is_taken_over(tmp_path, caplog):
    if process_is_alive(os.getpid(), "0"):
        pytest.skip("process start times are not known on this system")
    write_lock(tmp_path, started="0")
    RunLock(tmp_path).release()
    assert "taking over" in caplog.text


def test_lock_of_another_host_is_judged_by_its_heartbeat(tmp_path, dead_pid, caplog):
    write_lock(tmp_path, host="elsewhere", pid=dead_pid)
    with pytest.raises(CheckpointError, match=f"process {dead_pid} on elsewhere"):
        RunLock(tmp_path)
    long_ago = time.time() - run_lock.STALE_SECONDS - 1
    os.utime(tmp_path / "run.lock", (long_ago, long_ago))
    RunLock(tmp_path).release()
    assert "taking over" in caplog.text


def test_holder_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path) as lock:
        os.utime(lock.path, (0, 0))
        deadline = time.monotonic() + 10
        while lock.path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}', "[]"])
def test_unfinished_lock_file_does_not_stop_a_run(tmp_path, content, caplog):
    (tmp_path / "run.lock").write_text(content)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        pass


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path, dead_pid):
    write_lock(tmp_path, pid=dead_pid)
    start, got, refused = threading.Barrier(8), [], []

    def run():
        start.wait()
        try:
            got.append(RunLock(tmp_path))
        except CheckpointError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_forked_child_does_not_release_its_parents_lock(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:
        monkeypatch.setattr(os, "getpid", lambda: lock._pid + 1)
        lock.release()
        assert lock.path.exists()
        monkeypatch.undo()


def test_release_leaves_a_lock_that_another_process_took_over(tmp_path):
    lock = RunLock(tmp_path)
    write_lock(tmp_path, host="elsewhere")
    lock.release()
    assert lock.path.exists()


def test_process_is_alive(dead_pid):
    assert process_is_alive(os.getpid())
    assert not process_is_alive(dead_pid)
    assert not process_is_alive(1 << 40)


def test_a_killed_process_that_was_not_waited_for_counts_as_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert process_is_alive(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process_is_alive(child.pid) or not os.path.exists("/proc/self/stat")
    finally:
        child.wait()
        child.stdin.close()
