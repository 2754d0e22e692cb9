"""Starts a run's processes and makes a method data-parallel."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ssod_imwa.averaging.checks import checksum
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.weights import named_state
from ssod_imwa.engine.method import Method
from ssod_imwa.engine.signals import name_of, stop_signals
from ssod_imwa.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

# How long a rank waits for the others; the evaluation of a large set on one rank takes minutes.
TIMEOUT = timedelta(minutes=30)
_WATCH_SECONDS = 1.0
_PATIENCE_SECONDS = 2.0
# What Gloo and NCCL say of a process that is gone.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|[Rr]emote process")


def launch(
    main: Callable[..., Any],
    num_gpus: int = 1,
    args: tuple[Any, ...] = (),
    *,
    device: str = "auto",
    members: int = 1,
) -> Any:
    """Run `main(*args, ranks)` in one process for each GPU, or as one rank of a torchrun job.

    Under torchrun (RANK, WORLD_SIZE and LOCAL_RANK are set) this process is one rank and `num_gpus`
    is not looked at. Otherwise more than one GPU spawns that many processes, and one calls `main`
    here. GPUs talk over NCCL; `device` "cpu" makes `num_gpus` processes that talk over Gloo. `main`
    gets the `Ranks` of its process, the only thing below that knows of other processes. A process
    whose launcher, or torchrun agent, is gone gets a signal that ends the run.

    Args:
        main: a function of a module, since processes import it.
        num_gpus: processes on this machine.
        args: arguments of `main`, picklable.
        device: "auto" (GPUs if there are any), "cuda" or "cpu"; "cuda:N" for one process.
        members: how many members are trained at once, each by its share of the processes.

    Returns:
        What `main` returned. In a spawned process an integer other than 0 is its exit code instead,
        and None is returned here.

    Raises:
        UserError: there are fewer GPUs than processes, all of them are told to take one, members
            cannot share the processes evenly, a spawned process raised one or was killed, or this
            one has lost the others.
        SystemExit: with the exit code of the first spawned process that ended with one.
    """
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        rank, world_size, local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        _check_shares(world_size, members)
        _check_device(device, world_size)
        if use_cuda or device == "cuda":
            _check_gpus(local_rank + 1)
        _follow_parent(os.getppid())
        group = _process_group(rank, world_size, local_rank, "env://", use_cuda=use_cuda)
        with group, _lost_ranks_told(rank, world_size):
            return main(*args, Ranks.of_run(members))
    if num_gpus < 1:
        raise UserError(f"{num_gpus} processes are not allowed (must be at least 1)")
    _check_shares(num_gpus, members)
    if num_gpus == 1:
        return main(*args, Ranks.alone())
    _check_device(device, num_gpus)
    if device != "cpu":
        _check_gpus(num_gpus)
    _spawn(main, args, num_gpus, members, use_cuda=use_cuda)
    return None


def _spawn(
    main: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    members: int,
    *,
    use_cuda: bool,
) -> None:
    init_method = f"tcp://127.0.0.1:{_free_port()}"
    # torch would name each process that it ends; `_report` says why in one line.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    mistakes = mp.get_context("spawn").SimpleQueue()
    pids: list[int] = []
    with _forwarded_signals(pids) as forwarded:
        context = mp.spawn(
            _run_rank,
            (main, args, world_size, members, init_method, use_cuda, mistakes, os.getpid()),
            nprocs=world_size,
            join=False,
        )
        pids += context.pids()
        for number in forwarded:  # came while the processes were started
            _send(number, pids)
        try:
            while not context.join():
                pass
        except mp.ProcessExitedException as error:
            _report(error, world_size, mistakes, forwarded)
        except mp.ProcessRaisedException as error:
            if forwarded:
                raise SystemExit(128 + forwarded[0]) from error
            raise


def _report(
    error: mp.ProcessExitedException,
    world_size: int,
    mistakes: SimpleQueue[tuple[bool, str]],
    forwarded: list[int],
) -> NoReturn:
    """Say why the processes have ended, all of them.

    Args:
        error: of the first one that ended.
        world_size: how many there were.
        mistakes: what they wrote, and whether it is that they lost another one.
        forwarded: signals to the program.

    Raises:
        UserError: one of them raised it, or was killed.
        SystemExit: the program was told to end, or one of them ended with a code.
    """
    if error.exit_code < 0 and not forwarded:  # before what the others say, who lost it
        raise UserError(
            f"process {error.error_index + 1} of {world_size} was killed by "
            f"{name_of(-error.exit_code)} (by hand, or by the system when memory ran out); the "
            "others were ended, and the command with --resume goes on from the last checkpoint"
        ) from error
    lost: list[str] = []
    real: list[str] = []
    while not mistakes.empty():
        is_lost, text = mistakes.get()
        (lost if is_lost else real).append(text)
    if real:
        raise UserError(real[0]) from None
    if forwarded:
        raise SystemExit(128 + forwarded[0]) from error
    if lost:
        raise UserError(lost[0]) from None
    raise SystemExit(error.exit_code) from error


def distribute(method: Method, ranks: Ranks) -> None:
    """Make a method exchange gradients with the ranks that share its batches.

    They all get the student of the first of them. Buffers are not broadcast at each step: running
    statistics stay each rank's own until IMWA averages them.

    Raises:
        RuntimeError: ranks hold different models, for instance different teachers.
    """
    method.join(ranks)
    if ranks.batch.size > 1:
        _wrap_student(method)
    if ranks.run.size > 1:
        ranks.run.assert_equal(checksum(named_state(method.models())), "the initial models")


def _wrap_student(method: Method) -> None:
    device = next(method.student.parameters()).device
    method.parallel_student = DistributedDataParallel(
        method.parallel_student,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        process_group=method.ranks.batch.process_group,
    )


def _run_rank(
    rank: int,
    main: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    members: int,
    init_method: str,
    use_cuda: bool,
    mistakes: SimpleQueue[tuple[bool, str]],
    launcher: int,
) -> None:
    # A signal to the process group would come twice: by itself and from the launcher.
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    # Python's own handler raises KeyboardInterrupt, which torch's spawn takes for a success.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _follow_launcher(launcher)
    with _process_group(rank, world_size, rank, init_method, use_cuda=use_cuda):
        try:
            with _lost_ranks_told(rank, world_size):
                status = main(*args, Ranks.of_run(members))
        except LostRankError as error:
            # The launcher asks the first that ends why: let it be the one that failed.
            time.sleep(_PATIENCE_SECONDS)
            mistakes.put((True, str(error)))
            sys.exit(2)
        except UserError as error:
            mistakes.put((False, str(error)))
            sys.exit(2)
        # All ranks leave on a signal, and the first to be gone would have the others terminated.
        if isinstance(status, int) and status > 128:
            dist.barrier()
    if isinstance(status, int):
        sys.exit(status)


@contextmanager
def _process_group(
    rank: int, world_size: int, local_rank: int, init_method: str, *, use_cuda: bool
) -> Iterator[None]:
    if use_cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class LostRankError(UserError):
    """Another process of the run is gone; its own output says why."""


@contextmanager
def _lost_ranks_told(rank: int, world_size: int) -> Iterator[None]:
    """Turn what communication says when another process is gone into a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not _LOST.search(text):
            raise
        raise LostRankError(
            f"process {rank + 1} of {world_size} has lost another one, which was killed or has "
            f"failed ({text})"
        ) from error


def _follow_launcher(launcher: int) -> None:
    """End a spawned process without its launcher."""
    if sys.platform != "linux":
        _follow_parent(launcher)
    elif os.getppid() != launcher:  # later, torch's spawn has the kernel send SIGINT
        sys.exit(1)


def _follow_parent(parent: int) -> None:
    """Have this process get SIGTERM when its parent is gone, so that it trains for nobody.

    Args:
        parent: id of the process that started this one.
    """
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    # An orphan gets another parent; Windows keeps the number of the old one.
    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _forwarded_signals(pids: list[int]) -> Iterator[list[int]]:
    """Pass the signals that end a run on to processes, and outlive them; the signals so far."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        _send(number, pids)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # this one has left already


def _check_shares(processes: int, members: int) -> None:
    if processes % members:
        raise UserError(
            f"{members} members at once (IMWA.PARALLEL) on {_counted(processes)} are not allowed "
            f"(their number must be a multiple of {members}: start them with torchrun or "
            "--num-gpus, or train members in turn, IMWA.PARALLEL False)"
        )


def _check_device(device: str, processes: int) -> None:
    if processes > 1 and device.startswith("cuda:"):
        raise UserError(
            f"MODEL.DEVICE = {device!r} is not allowed for {_counted(processes)}, each of which "
            "takes a GPU of its own (must be auto, cuda or cpu)"
        )


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _check_gpus(needed: int) -> None:
    available = torch.cuda.device_count()
    if needed > available:
        raise UserError(
            f"{needed} GPUs are asked for and {available} found; "
            "use fewer processes, or set MODEL.DEVICE cpu"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
