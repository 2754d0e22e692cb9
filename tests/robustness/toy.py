"""A small but complete training run, and a server that runs it in killable processes.

Two members, three episodes, 24 steps; student, EMA teacher, dropout, batch norm, momentum and an
method state, so that anything a checkpoint forgets changes the final bits.

As a program it reads one JSON object of `run`'s options a line from standard input, forks a child
that runs it (importing torch anew would take seconds) and answers with the child's exit code, or
minus the signal that ended it. `fault` and `log` are a fault to inject and a file for the log. With
`processes` it forks so many, which train `at_once` members at the same time, and answers with the
list of their exit codes; `struck` is then the rank that faults, signals and alarms are for.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.averaging.parallel import ParallelIMWA
from ssod_imwa.averaging.ranks import Group, Ranks
from ssod_imwa.engine import launch
from ssod_imwa.engine import trainer as loop
from ssod_imwa.engine.checkpoint.writing import CheckpointHook, faults, prepare_output, resume
from ssod_imwa.engine.hooks import IMWAHook, LRHook
from ssod_imwa.engine.launch import distribute
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.signals import SignalHook, StopSignals
from ssod_imwa.engine.teacher import Teacher
from ssod_imwa.engine.time_left import TimeLeft
from ssod_imwa.engine.trainer import HookBase, Trainer
from ssod_imwa.engine.writers import JSONWriter, MetricsHook
from ssod_imwa.errors import UserError

MEMBERS, EPISODES, ITERATIONS, SEED = 2, 3, 12, 1
STEPS = MEMBERS * ITERATIONS
# Members at once talk in the middle of an episode, too.
loop.TALK_STEPS, loop.TALK_SECONDS = 2, 1000.0
# Options of what happens to one rank alone.
STRIKES = ("fault", "signal_inside", "signal_after", "alarm_after")


class Toy(Method):
    """Distillation from an EMA teacher; its state is a running mean of the loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        student = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        super().__init__(student, Teacher(student, 0.9))
        self.mean_loss = 1.0

    def losses(self, batch: torch.Tensor, t: int) -> dict[str, torch.Tensor]:
        noisy = batch + 0.1 * torch.randn_like(batch)
        output = self.parallel_student(noisy)
        loss = (output - self.teacher.model(batch).tanh()).square().mean()
        of_all_ranks = self.ranks.batch.mean(loss.detach()).item()
        self.mean_loss = 0.9 * self.mean_loss + 0.1 * of_all_ranks
        return {"loss": loss / self.mean_loss}

    def state_dict(self) -> dict[str, float]:
        return {"mean_loss": self.mean_loss}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean_loss = state["mean_loss"]


class SignalInside(IMWAHook):
    """Sends this process a signal at the n-th tensor operation of what IMWA does after a step."""

    def __init__(self, imwa: IMWA, *, step: int, operation: int, number: int) -> None:
        super().__init__(imwa)
        self.step, self.operation, self.number = step, operation, number

    def after_step(self) -> None:
        if self.trainer.iter != self.step:
            super().after_step()
            return
        with _SignalAt(self.operation, self.number):
            super().after_step()


class _SignalAt(TorchDispatchMode):
    def __init__(self, operation: int, number: int) -> None:
        super().__init__()
        self.left, self.number = operation, number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        self.left -= 1
        return function(*args, **(kwargs or {}))


class CallAt(HookBase):
    """Calls a function after a step, before anything is written."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.step, self.function = step, function

    def after_step(self) -> None:
        if self.trainer.iter == self.step:
            self.function()


def build_batches(
    schedule: EpisodeSchedule, group: Group
) -> Callable[[int], Iterator[torch.Tensor]]:
    def batches(start: int) -> Iterator[torch.Tensor]:
        for position in map(schedule.position, range(start, len(schedule))):
            generator = counted_generator(SEED, "data", position.member, position.t)
            batch = torch.from_numpy(generator.standard_normal((8, 4), dtype="float32"))
            yield batch[group.rank :: group.size]

    return batches


def run(
    directory: str,
    *,
    ranks: Ranks = Ranks.alone(),
    start: int = 0,
    period: int = 3,
    keep: int = 1,
    store: str = "dict",
    optimizer_state: str = "keep",
    signal_inside: list[int] | None = None,
    signal_after: list[int] | None = None,
    remove_directory_after: int | None = None,
    file_size_limit: int | None = None,
    alarm_after: float | None = None,
) -> int:
    """Start or resume the run in a directory; its exit code.

    Args:
        directory: output directory, made if it is not there.
        ranks: who trains which member.
        start: own iterations before members part.
        period: of `CheckpointHook`.
        keep: of `CheckpointHook`.
        store: of `IMWA`.
        optimizer_state: of `IMWA`.
        signal_inside: step, tensor operation of its averaging or re-seeding, and signal.
        signal_after: step and signal.
        remove_directory_after: step after which the output directory vanishes.
        file_size_limit: bytes that fit in a file, as on a full disk.
        alarm_after: seconds until SIGALRM ends the process, which nothing here handles.
    """
    if alarm_after is not None:
        signal.setitimer(signal.ITIMER_REAL, alarm_after)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    at_once = ranks.members > 1
    schedule = EpisodeSchedule(
        ITERATIONS,
        episodes=EPISODES,
        members=MEMBERS,
        start=start,
        only=ranks.member if at_once else None,
    )
    method = Toy()
    distribute(method, ranks)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.05, momentum=0.9)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    batches = build_batches(schedule, ranks.batch)
    trainer = Trainer(method, schedule, batches, optimizer, seed=SEED, ranks=ranks)
    make = ParallelIMWA if at_once else partial(IMWA, store=store)
    imwa = make(
        schedule,
        method.models(),
        optimizer=optimizer,
        member_state={"method": method},
        optimizer_state=optimizer_state,
        ranks=ranks,
    )
    identity = {"M": MEMBERS, "E": EPISODES, "T": ITERATIONS, "seed": SEED, "start": start}
    checkpoint = CheckpointHook(directory, run=identity, period=period, keep=keep)
    signals = StopSignals()
    signal_hook = SignalHook(signals, checkpoint.save_now)
    averaging = IMWAHook(imwa)
    if signal_inside is not None:
        step, operation, number = signal_inside
        averaging = SignalInside(imwa, step=step, operation=operation, number=number)
    hooks: list[HookBase] = [LRHook(lambda t: 1 / (1 + t)), averaging]
    if signal_after is not None:
        step, number = signal_after
        hooks.append(CallAt(step, lambda: os.kill(os.getpid(), number)))
    if remove_directory_after is not None:
        hooks.append(CallAt(remove_directory_after, lambda: shutil.rmtree(directory)))
    hooks += [
        MetricsHook([JSONWriter(Path(directory) / "metrics.json")], 2, TimeLeft(trainer.schedule)),
        checkpoint,
        signal_hook,
    ]
    trainer.register_hooks(hooks)
    with signals, prepare_output(directory, resume=True, run=ranks.run) or nullcontext() as lock:
        signals.abandon = None if lock is None else lock.abandon
        resume(trainer, directory, identity)
        trainer.train()
    return signal_hook.exit_code


def _child(options: dict[str, Any], rank: int) -> int:
    log = os.open(options.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    processes, at_once = options.pop("processes", 1), options.pop("at_once", 1)
    place, struck = options.pop("rendezvous"), options.pop("struck", 0)
    if rank != struck:
        options = {name: value for name, value in options.items() if name not in STRIKES}
    if fault := options.pop("fault", None):
        os.environ[faults.VARIABLE] = fault
    signal.alarm(120)  # a run that hangs fails its test instead of stopping the server
    try:
        if processes == 1:
            return run(**options)
        group = launch._process_group(rank, processes, rank, f"file://{place}", use_cuda=False)
        with launch._lost_ranks_told(rank, processes), group:
            return run(ranks=Ranks.of_run(at_once), **options)
    except UserError as error:
        logging.error("error: %s", error)
        return 2
    except BaseException:
        logging.exception("crashed")
        return 1


def serve() -> None:
    """Answer requests until standard input is closed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(folder)  # what torch imports on first use, seconds for each child otherwise
    for line in sys.stdin:
        options = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            options["rendezvous"] = f"{folder}/rendezvous"
            pids = [_forked(options, rank) for rank in range(options.get("processes", 1))]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes if "processes" in options else codes[0]), flush=True)


def _forked(options: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = _child(dict(options), rank)
        logging.shutdown()
        os._exit(code)
    return pid


if __name__ == "__main__":
    serve()
