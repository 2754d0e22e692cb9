import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import SimpleQueue
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import needs_fork, on_two_ranks
from torch import nn

import ssod_imwa
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.engine import launch
from ssod_imwa.engine.evaluation import EvaluationHook, Evaluations
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.signals import SignalHook, StopSignals
from ssod_imwa.engine.trainer import HookBase
from ssod_imwa.errors import NonFiniteError, UserError


@needs_fork
@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_equal_one_rank_on_the_whole_batch(tiny, tmp_path, parts):
    """Without dropout and batch statistics, which are each rank's own."""
    options = {"dropout": 0.0, "norm": False}

    def train(rank):
        # A different start on rank 1: the wrapper has to take over rank 0's student.
        method = tiny.method(**options)
        if rank == 1:
            nn.init.ones_(method.student[0].weight)
        launch.distribute(method, Ranks.of_run())
        assert method.parallel_student is not method.student
        schedule = tiny.trainer(5).schedule
        batches = tiny.batches(schedule, rank=rank, world_size=2)
        trainer = tiny.trainer(5, method=method, batches=batches, accumulation=parts)
        trainer.train()
        return {name: tiny.copied_state(model) for name, model in trainer.method.models().items()}

    ranks = on_two_ranks(train, tmp_path)
    alone = tiny.trainer(5, method=tiny.method(**options))
    alone.train()
    for name, model in alone.method.models().items():
        assert tiny.same_state(ranks[0][name], ranks[1][name])
        for key, value in model.state_dict().items():
            torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-5, atol=1e-6)


def add_imwa(trainer):
    imwa = IMWA(
        trainer.schedule,
        trainer.method.models(),
        optimizer=trainer.optimizer,
        ranks=trainer.ranks,
    )
    trainer.register_hooks([IMWAHook(imwa)])
    return trainer


@needs_fork
@pytest.mark.parametrize("norm", [False, True])
def test_averages_of_two_ranks_agree(tiny, tmp_path, norm):
    """With batch norm, each rank's statistics are its own until an episode ends."""
    options = {"dropout": 0.0, "norm": norm}
    sizes = {"episodes": 2, "members": 3}

    def train(rank):
        method = tiny.method(**options)
        launch.distribute(method, Ranks.of_run())
        batches = tiny.batches(tiny.trainer(6, **sizes).schedule, rank=rank, world_size=2)
        trainer = tiny.trainer(6, method=method, batches=batches, **sizes)
        save = tiny.SaveAt(4)
        trainer.register_hooks([save])
        add_imwa(trainer).train()
        states = {n: tiny.copied_state(m) for n, m in trainer.method.models().items()}
        return {"end": states, "inside": save.read()["models"]}

    ranks = on_two_ranks(train, tmp_path)
    alone = add_imwa(tiny.trainer(6, method=tiny.method(**options), **sizes))
    alone.train()
    assert tiny.same_state(ranks[0]["inside"]["student"], ranks[1]["inside"]["student"]) != norm
    for name, model in alone.method.models().items():
        assert tiny.same_state(ranks[0]["end"][name], ranks[1]["end"][name])
        for key, value in model.state_dict().items():
            if not norm:
                torch.testing.assert_close(ranks[0]["end"][name][key], value, rtol=1e-5, atol=1e-6)


@needs_fork
def test_different_teachers_are_refused(tiny, tmp_path):
    def differ(rank):
        method = tiny.method()
        nn.init.constant_(method.teacher.model[0].bias, float(rank))
        with pytest.raises(RuntimeError, match="initial models must be equal"):
            launch.distribute(method, Ranks.of_run())

    on_two_ranks(differ, tmp_path)


@needs_fork
def test_bad_loss_on_one_rank_stops_all_ranks_in_the_same_step(tiny, tmp_path):
    def train(rank):
        method = tiny.method()
        good = method.losses

        def losses(batch, t):
            records = good(batch, t)
            bad = rank == 1 and t == 2
            return {"loss_cls": records["loss_cls"] * (float("nan") if bad else 1.0)}

        method.losses = losses
        # Not distributed: rank 0's own loss and gradients stay finite.
        trainer = tiny.trainer(5, method=method, ranks=Ranks.of_run())
        with pytest.raises(NonFiniteError, match="global step 3 "):
            trainer.train()
        finite = [bool(torch.isfinite(p).all()) for p in trainer.parameters]
        return [trainer.iter, all(finite)]

    assert on_two_ranks(train, tmp_path) == [[2, True], [2, True]]


@needs_fork
def test_signal_to_one_rank_ends_all_ranks_at_the_same_step(tiny, tmp_path):
    class Signaled(HookBase):
        def after_backward(self):
            if self.trainer.iter == 1 and self.trainer.ranks.run.rank == 1:
                os.kill(os.getpid(), 15)

    def train(rank):
        trainer, saved = tiny.trainer(5, ranks=Ranks.of_run()), []
        with StopSignals() as signals:
            hook = SignalHook(signals, lambda: saved.append(trainer.iter))
            trainer.register_hooks([Signaled(), hook])
            trainer.train()
        return [trainer.iter, saved, hook.exit_code]

    assert on_two_ranks(train, tmp_path) == [[2, [1], 143]] * 2


@needs_fork
def test_polling_evaluations_of_two_ranks_leave_together(tiny, tmp_path):
    def train(rank):
        trainer = tiny.trainer(2, ranks=Ranks.of_run())
        signals = StopSignals()
        hook, polls = SignalHook(signals, lambda: None), []

        def evaluate(model):
            for number in range(50):
                polls.append(number)
                if number == 4 and rank == 0:
                    os.kill(os.getpid(), 2)
                hook.poll()
            return {}

        evaluations = Evaluations()
        evaluation = EvaluationHook("evaluate", evaluate, evaluations, stage="average")
        trainer.register_hooks([evaluation, hook])
        with signals:
            trainer.train()
        return [len(polls), evaluations.records, hook.exit_code]

    assert on_two_ranks(train, tmp_path) == [[5, [], 130]] * 2


@needs_fork
def test_an_evaluation_that_a_signal_interrupts_is_of_the_last_step(tiny, tmp_path):
    """Also where members at once would have talked later: a resume makes up for that one alone."""

    def train(rank):
        ranks = Ranks.of_run(2)
        schedule = EpisodeSchedule(9, members=2, only=ranks.member)
        trainer = tiny.trainer(9, schedule=schedule, ranks=ranks)
        signals = StopSignals()
        saved = []
        hook = SignalHook(signals, lambda: saved.append(trainer.iter))

        def evaluate(model):
            os.kill(os.getpid(), signal.SIGTERM)
            hook.poll()
            return {}

        evaluation = EvaluationHook("running", evaluate, Evaluations(), stage="running", period=4)
        trainer.register_hooks([evaluation, hook])
        with signals:
            trainer.train()
        return saved

    assert on_two_ranks(train, tmp_path) == [[3], [3]]


def test_nothing_below_asks_torch_for_ranks():
    """They are handed around as `Ranks`; a foreign trainer's hook has nobody who would."""
    package = Path(ssod_imwa.__file__).parent
    askers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"torch\.distributed|Ranks\.of_run\(\)", path.read_text())
    }
    assert askers == {
        "averaging/ranks.py",
        "engine/launch.py",
        "integrations/detectron2/hook.py",
    }


def test_one_process_calls_main_here():
    assert launch.launch(lambda a, b, ranks: (a + b, ranks), 1, (1, 2)) == (3, Ranks.alone())


def test_too_many_gpus_and_no_process_are_users_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 GPUs are asked for and 1 found"):
        launch.launch(print, 2)
    with pytest.raises(UserError, match="0 processes are not allowed"):
        launch.launch(print, 0)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_processes_that_would_all_take_one_gpu_are_a_users_error(monkeypatch, environment):
    for name, value in environment.items():  # of torchrun
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="'cuda:1' is not allowed for 2 processes"):
        launch.launch(print, 2, device="cuda:1")


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_that_two_members_cannot_share_are_a_users_error(processes):
    with pytest.raises(UserError, match=r"2 members at once .* must be a multiple of 2"):
        launch.launch(print, processes, device="cpu", members=2)


def test_torchrun_is_recognized(monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(launch._free_port())}.items():
        monkeypatch.setenv(name, value)
    assert launch.launch(lambda ranks: (dist.get_backend(), ranks.run.size), 8, device="cpu") == (
        "gloo",
        1,
    )
    assert not dist.is_initialized()


SCRIPT = """
    import os, signal, sys, time
    from ssod_imwa.cli import run_main
    from ssod_imwa.engine.launch import launch
    from ssod_imwa.errors import UserError

    def work(folder, how, ranks):
        run = ranks.run
        total = sum(run.all_gather(run.rank + 1))
        open(os.path.join(folder, f"{run.rank}"), "w").write(str(total))
        if how == "status" and run.rank == 1:
            return 3
        if how == "mistake" and run.rank == 1:
            raise UserError("no such file")
        if how == "failure" and run.rank == 1:
            raise RuntimeError("a defect")
        if how == "killed" and run.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("failure", "killed"):
            run.barrier()
        if how == "alone":
            os.write(1, f"{os.getpid()}\\n".encode())
            signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            time.sleep(100)
        if how == "wait":
            stop = []
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda number, frame: stop.append(number))
            os.write(1, b"ready\\n")  # one write: two ranks share the pipe
            while not stop:
                time.sleep(0.01)
            if run.is_main:
                time.sleep(0.5)
                open(os.path.join(folder, "received"), "w").write(str(stop))
            return 128 + stop[0]
        return 0

    if __name__ == "__main__":
        run_main(lambda: launch(work, 2, (sys.argv[1], sys.argv[2]), device="cpu"))
"""


def start_script(tmp_path, how, options=()):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    root = str(Path(ssod_imwa.__file__).parents[1])  # works without an installation, too
    command = [sys.executable, *options, str(script), str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("return", 0), ("status", 3), ("mistake", 2)])
def test_spawned_processes_talk_and_hand_on_how_they_ended(tmp_path, how, code):
    process = start_script(tmp_path, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert errors == ("error: no such file\n" if how == "mistake" else "")
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "number"),
    [
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),
        (os.killpg, signal.SIGINT),
        (os.killpg, signal.SIGHUP),
    ],
)
def test_a_signal_to_the_launcher_or_its_group_reaches_each_rank_once(tmp_path, kill, number):
    process = start_script(tmp_path, "wait")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    kill(process.pid, number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert (tmp_path / "received").read_text() == f"[{int(number)}]"


def errors_of(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_killed_rank_is_named_even_if_another_has_said_that_it_lost_it():
    lost, real = (True, "has lost another one"), (False, "no such file")

    def report(code, mistakes, forwarded=()):
        queue = SimpleQueue()
        for mistake in mistakes:
            queue.put(mistake)
        error = mp.ProcessExitedException("", 1, 100, code)
        launch._report(error, 2, queue, list(forwarded))

    with pytest.raises(UserError, match="process 2 of 2 was killed by SIGKILL"):
        report(-9, [lost])
    with pytest.raises(UserError, match="has lost another one"):
        report(2, [lost])
    with pytest.raises(UserError, match="no such file"):
        report(2, [lost, real], [15])
    for code in (-15, 143, 2):  # told to end, whatever each process made of it
        with pytest.raises(SystemExit) as stop:
            report(code, [lost], [15, 2])
        assert stop.value.code == 143


@pytest.mark.slow
def test_a_rank_that_is_killed_alone_ends_the_run_with_an_error_line(tmp_path):
    process = start_script(tmp_path, "killed")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = errors_of(errors)
    assert line.startswith("error: process 2 of 2 was killed by SIGKILL")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_that_fails_is_reported_and_not_the_one_that_lost_it(tmp_path):
    process = start_script(tmp_path, "failure")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "RuntimeError: a defect" in errors
    assert not errors_of(errors)


def wait_for_end(pids):
    until = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]


@pytest.mark.slow
@pytest.mark.parametrize("agent", [False, True], ids=["launcher", "torchrun"])
def test_ranks_leave_when_what_started_them_is_killed(tmp_path, agent):
    options = [*TORCHRUN, str(launch._free_port())] if agent else []
    process = start_script(tmp_path, "alone", options)
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    assert all(map(is_running, ranks))
    process.kill()
    process.wait()
    assert not wait_for_end(ranks)


@pytest.mark.slow
def test_a_rank_of_torchrun_that_lost_another_says_so_in_one_line(tmp_path):
    process = start_script(tmp_path, "killed", [*TORCHRUN, str(launch._free_port())])
    _, errors = process.communicate(timeout=120)
    assert process.returncode
    assert [line.partition(" (")[0] for line in errors_of(errors)] == [
        "error: process 1 of 2 has lost another one, which was killed or has failed"
    ]


def test_other_errors_of_communication_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mismatch"), launch._lost_ranks_told(0, 2):
        raise RuntimeError("Tensor sizes mismatch")
    with pytest.raises(UserError, match="process 1 of 2 has lost"), launch._lost_ranks_told(0, 2):
        raise RuntimeError("[pair.cc:534]\nConnection closed by peer [127.0.0.1]:2")
