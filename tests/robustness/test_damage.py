"""Damaged files, full disks, other processes and finished runs."""

import json
import os
import random
import signal

import pytest

from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.lock import RunLock
from ssod_imwa.engine.checkpoint.output import resume_files

STEPS = 24
LOCKS = ("run.lock", ".run.lock.guard")


@pytest.fixture
def half(server, tmp_path):
    """Folder of a run that was killed after step 12; checkpoints of steps 8 and 11."""
    assert server.run(tmp_path / "run", fault="step:13=kill") == -signal.SIGKILL
    assert list(resume_files(tmp_path / "run")) == [11, 8]
    return tmp_path / "run"


def truncate(share):
    return lambda content: content[: int(share * len(content))]


def flip(seed):
    def damaged(content):
        bits, content = random.Random(seed), bytearray(content)
        content[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        return bytes(content)

    return damaged


DAMAGES = {
    "empty": truncate(0),
    "truncated to 10 %": truncate(0.1),
    "truncated to 50 %": truncate(0.5),
    "truncated to 99 %": truncate(0.99),
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"\0",
    "flipped bit 1": flip(1),
    "flipped bit 2": flip(2),
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"model_0000008.pth\n",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_newest_checkpoint_costs_one_period(server, half, assert_same_run, name):
    newest = half / "model_0000011.pth"
    newest.write_bytes(DAMAGES[name](newest.read_bytes()))
    assert server.run(half) == 0, server.log
    assert f"{newest} is damaged: " in server.log
    assert "model_0000008.pth after global step 9" in server.log
    assert_same_run(half)


def test_all_damaged_ends_with_an_error_and_changes_nothing(server, half):
    for path in resume_files(half).values():
        os.truncate(path, 100)
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.name not in LOCKS}
    assert server.run(half) == 2
    assert server.log.count("it has 100 bytes instead of") == 2
    after = {p.name: p.read_bytes() for p in half.iterdir() if p.name not in LOCKS}
    assert after == before


def test_full_disk_ends_the_run_and_leaves_the_checkpoints(server, half, assert_same_run):
    before = {path.name: path.read_bytes() for path in half.glob("model_*")}
    assert server.run(half, file_size_limit=5000) == 2
    assert server.log.count("could not be written: [Errno 27] File too large") == 3
    assert {path.name: path.read_bytes() for path in half.glob("model_*")} == before
    assert not list(half.glob("*.tmp.*"))
    assert server.run(half) == 0, server.log
    assert_same_run(half)


def test_vanished_directory_ends_the_run_with_an_error(server, half):
    assert server.run(half, remove_directory_after=13) == 2
    (error,) = [line for line in server.log.splitlines() if "error: " in line]
    assert f"output folder {half} was removed" in error
    assert "Traceback" not in server.log


def test_second_process_is_refused_while_the_first_is_alive(server, half, assert_same_run):
    lock = RunLock(half)  # takes over from the process that was killed
    assert server.run(half) == 2
    assert f"in use by process {os.getpid()} on" in server.log
    lock.release()
    assert server.run(half) == 0
    assert_same_run(half)


def test_lock_of_a_killed_process_is_taken_over(server, half):
    pid = json.loads((half / "run.lock").read_text())["pid"]
    assert server.run(half) == 0
    assert f"taking over {half / 'run.lock'} from process {pid} on" in server.log
    assert not (half / "run.lock").exists()


def test_stop_at_the_last_step_and_resume_a_finished_run(server, tmp_path, assert_same_run):
    assert server.run(tmp_path, signal_after=[STEPS - 1, signal.SIGTERM]) == 143
    assert_same_run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model_*")}
    (tmp_path / "model_final.pth").write_bytes(b"")
    assert server.run(tmp_path) == 0
    assert_same_run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model_*")} == before


def test_row_that_a_kill_cut_in_two_is_dropped(server, half, assert_same_run):
    with (half / "metrics.json").open("ab") as file:
        file.write(b'{"iteration": 13, "total_lo')
    assert server.run(half) == 0
    assert_same_run(half)


def test_final_file_is_the_last_average(undisturbed):
    final = load_checkpoint(undisturbed / "model_final.pth")
    state = load_checkpoint(undisturbed / f"model_{STEPS - 1:07d}.pth")
    assert damage(undisturbed / "model_final.pth") is None
    for name in ("student", "teacher"):
        assert final[name].keys() == state["trainer"]["models"][name].keys()
        for key, value in final[name].items():
            assert (value == state["trainer"]["models"][name][key]).all()
