"""Starts a run's processes and makes a method data-parallel."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from ssod_imwa.averaging.checks import checksum
from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.averaging.weights import named_state
from ssod_imwa.engine.method import Method
from ssod_imwa.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

# How long a rank waits for the others; the evaluation of a large set on one rank takes minutes.
TIMEOUT = timedelta(minutes=30)


def launch(
    main: Callable[..., Any], num_gpus: int = 1, args: tuple[Any, ...] = (), *, device: str = "auto"
) -> Any:
    """Run `main(*args, ranks)` in one process for each GPU, or as one rank of a torchrun job.

    Under torchrun (RANK, WORLD_SIZE and LOCAL_RANK are set) this process is one rank and `num_gpus`
    is not looked at. Otherwise more than one GPU spawns that many processes, and one calls `main`
    here. GPUs talk over NCCL; `device` "cpu" makes `num_gpus` processes that talk over Gloo. `main`
    gets the `Ranks` of its process, the only thing below that knows of other processes.

    Args:
        main: a function of a module, since processes import it.
        num_gpus: processes on this machine.
        args: arguments of `main`, picklable.
        device: "auto" (GPUs if there are any), "cuda" or "cpu".

    Returns:
        What `main` returned. In a spawned process an integer other than 0 is its exit code instead,
        and None is returned here.

    Raises:
        UserError: there are fewer GPUs than processes, or a spawned process raised one.
        SystemExit: with the exit code of the first spawned process that ended with one.
    """
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        rank, world_size, local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        if use_cuda or device == "cuda":
            _check_gpus(local_rank + 1)
        with _process_group(rank, world_size, local_rank, "env://", use_cuda=use_cuda):
            return main(*args, Ranks.of_run())
    if num_gpus < 1:
        raise UserError(f"{num_gpus} processes are not allowed (must be at least 1)")
    if num_gpus == 1:
        return main(*args, Ranks.alone())
    if device != "cpu":
        _check_gpus(num_gpus)
    _spawn(main, args, num_gpus, use_cuda=use_cuda)
    return None


def _spawn(
    main: Callable[..., Any], args: tuple[Any, ...], world_size: int, *, use_cuda: bool
) -> None:
    init_method = f"tcp://127.0.0.1:{_free_port()}"
    mistakes = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _run_rank,
        (main, args, world_size, init_method, use_cuda, mistakes),
        nprocs=world_size,
        join=False,
    )
    try:
        with _forwarded_signals(context.pids()):
            while not context.join():
                pass
    except mp.ProcessExitedException as error:
        if not mistakes.empty():
            raise UserError(mistakes.get()) from None
        # A process that a signal killed has a negative code; shells add 128 to the signal.
        code = error.exit_code
        raise SystemExit(code if code >= 0 else 128 - code) from error


def distribute(method: Method, ranks: Ranks) -> None:
    """Make a method exchange gradients with the ranks that share its batches.

    They all get the student of the first of them. Buffers are not broadcast at each step: running
    statistics stay each rank's own until IMWA averages them.

    Raises:
        RuntimeError: ranks hold different models, for instance different teachers.
    """
    method.ranks = ranks
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
    init_method: str,
    use_cuda: bool,
    mistakes: SimpleQueue[str],
) -> None:
    # A signal to the process group would come twice: by itself and from the launcher.
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    with _process_group(rank, world_size, rank, init_method, use_cuda=use_cuda):
        try:
            status = main(*args, Ranks.of_run())
        except UserError as error:
            mistakes.put(str(error))
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


@contextmanager
def _forwarded_signals(pids: list[int]) -> Iterator[None]:
    """While processes run, pass SIGTERM and SIGINT on to them, and outlive them."""

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # this one has left already

    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, forward) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
