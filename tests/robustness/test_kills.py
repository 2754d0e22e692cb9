"""Interrupted runs end with the bits of an uninterrupted one, wherever they were interrupted."""

import json
import random
import signal
import time

import pytest

from ssod_imwa.engine.checkpoint.atomic import damage
from ssod_imwa.engine.checkpoint.output import resume_files

STEPS = 24
KILLED = -signal.SIGKILL
# Checkpoints of the toy run: each third step and each episode's end.
CHECKPOINTS = sorted({g for g in range(STEPS) if (g + 1) % 3 == 0} | {7, 15, 23})


def newest_intact(folder):
    return next((g for g, path in resume_files(folder).items() if damage(path) is None), None)


def resumed_at(log):
    lines = [line for line in log.splitlines() if "resuming from" in line]
    return int(lines[0].rpartition(" ")[2]) if lines else 0


def kill_and_finish(server, folder, **options):
    """Kill a run by a fault, check what is left, finish it; the step at which it was resumed."""
    assert server.run(folder, **options) == KILLED, server.log
    left = newest_intact(folder)
    assert (left is None) == (not resume_files(folder))
    assert server.run(folder) == 0, server.log
    start = resumed_at(server.log)
    assert start == (0 if left is None else left + 1)
    return start


def kill_at_step(server, folder, g):
    start = kill_and_finish(server, folder, fault=f"step:{g}=kill")
    # The newest checkpoint before step g: at most one period is lost.
    assert start == max((c + 1 for c in CHECKPOINTS if c < g), default=0)


@pytest.mark.parametrize("g", range(0, STEPS, 3))
def test_kill_at_a_step(server, assert_same_run, tmp_path, g):
    kill_at_step(server, tmp_path, g)
    assert_same_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("g", [g for g in range(STEPS) if g % 3])
def test_kill_at_every_other_step(server, assert_same_run, tmp_path, g):
    kill_at_step(server, tmp_path, g)
    assert_same_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["dict", "stream"])
@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset", "carry"])
def test_kill_at_every_step_with_every_setting(server, tmp_path, store, optimizer_state):
    settings = {"store": store, "optimizer_state": optimizer_state, "period": 1}
    assert server.run(tmp_path / "whole", **settings) == 0
    for g in range(STEPS):
        assert server.run(tmp_path / "cut", fault=f"step:{g}=kill", **settings) == KILLED
    assert server.run(tmp_path / "cut", **settings) == 0
    whole, cut = (
        json.loads((tmp_path / name / "model_final.pth.json").read_text())["sha256"]
        for name in ("whole", "cut")
    )
    assert whole == cut


FAULTS = [
    "open", "1", "half", "all-1", "fsync", "digest:open", "digest:20", "digest:fsync",
    "digest:replace", "replace", "pointer:open", "pointer:5", "pointer:fsync", "pointer:replace",
    "retention", "retention:digest",
]  # fmt: skip


@pytest.mark.parametrize("occurrence", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("point", FAULTS)
def test_kill_inside_a_write(server, undisturbed, assert_same_run, tmp_path, point, occurrence):
    size = json.loads((undisturbed / "model_final.pth.json").read_text())["bytes"]
    point = {"half": str(size // 2), "all-1": str(size - 1)}.get(point, point)
    point = point if ":" in point or point == "retention" else f"write:{point}"
    start = kill_and_finish(server, tmp_path, fault=f"{point}=kill@{occurrence}")
    assert start in [0, *(c + 1 for c in CHECKPOINTS)]
    assert_same_run(tmp_path)


@pytest.mark.parametrize("step", [3, 7, 15])
@pytest.mark.parametrize("operation", [0, 4, 15])
def test_kill_inside_averaging_and_reseeding(server, assert_same_run, tmp_path, step, operation):
    options = {"signal_inside": [step, operation, signal.SIGKILL]}
    start = kill_and_finish(server, tmp_path, **options)
    assert start == max(c + 1 for c in CHECKPOINTS if c < step)
    assert_same_run(tmp_path)


def test_three_kills_in_one_run(server, assert_same_run, tmp_path):
    for g in (5, 11, 20):
        assert server.run(tmp_path, fault=f"step:{g}=kill") == KILLED
    assert server.run(tmp_path) == 0
    assert_same_run(tmp_path)


@pytest.mark.slow
def test_fifty_kills_at_random_times(server, assert_same_run, tmp_path):
    times, kills, finished = random.Random(1), 0, 0
    began = time.monotonic()
    assert server.run(tmp_path / "timed") == 0
    duration = time.monotonic() - began
    while kills < 50:
        folder = tmp_path / str(finished)
        status = server.run(folder, alarm_after=times.uniform(0, 0.7 * duration))
        kills += status == -signal.SIGALRM
        if status == 0:
            assert_same_run(folder)
            finished += 1
    assert server.run(tmp_path / str(finished)) == 0
    assert_same_run(tmp_path / str(finished))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("g", [0, 4, 7, 23])
def test_signal_ends_the_run_with_a_checkpoint_of_the_step(
    server, assert_same_run, tmp_path, number, g
):
    assert server.run(tmp_path, signal_after=[g, number]) == 128 + number, server.log
    assert newest_intact(tmp_path) == g
    assert server.run(tmp_path) == 0, server.log
    assert resumed_at(server.log) == g + 1
    assert_same_run(tmp_path)


@pytest.mark.parametrize("step", [3, 7])
def test_signal_inside_averaging_is_served_after_it(server, assert_same_run, tmp_path, step):
    options = {"signal_inside": [step, 4, signal.SIGTERM]}
    assert server.run(tmp_path, **options) == 143, server.log
    assert newest_intact(tmp_path) == step
    assert server.run(tmp_path) == 0, server.log
    assert_same_run(tmp_path)
