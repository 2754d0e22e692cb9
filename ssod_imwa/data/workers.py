"""Processes that read images for this one: they outlive its signals but never itself."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ssod_imwa.data import shared_memory
from ssod_imwa.data.shared_memory import describe, megabytes
from ssod_imwa.data.transfer import Packed, pack, unpack
from ssod_imwa.errors import DataError, UserError


class LoaderError(UserError):
    """A process that reads images has died, or cannot hand them over."""


def deliveries(
    reader: Dataset,
    sampler: Iterable[Any],
    *,
    num_workers: int,
    pin_memory: bool,
    preload: Sequence[str],
) -> Iterator[Any]:
    """What a reader makes of each item of a sampler, in order.

    Args:
        reader: item -> what `pack` made of the value, or of a DataError.
        sampler: the items.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: deliver tensors in page-locked memory.
        preload: modules that the processes need.

    Raises:
        DataError: the reader has packed one.
        LoaderError: a process has died, or could not hand over what it read.
    """
    items = iter(sampler)
    if num_workers and shared_memory.is_scarce():
        for item in itertools.islice(items, 1):
            first = reader[item]
            needed = _waiting(first, num_workers)
            num_workers = shared_memory.fitting_workers(num_workers, needed)
            yield _delivered(first)
    loader = DataLoader(
        _Sharing(reader),
        sampler=items,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_outlive_signals,
        multiprocessing_context=_context(preload) if num_workers else None,
        pin_memory=pin_memory,
        # Its own generator: the default draws from, and so moves, the global one.
        generator=torch.Generator(),
    )
    try:
        iterator = iter(loader)
    except OSError as error:  # no room for a lock
        raise LoaderError(
            f"processes that read images cannot be started ({error}; {describe()}): set "
            "DATALOADER.NUM_WORKERS 0"
        ) from error
    while True:
        try:
            packed = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers or not _tells_of_death(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LoaderError(
                f"a process that reads images has died ({reason}); usual causes are too little "
                f"memory or shared memory ({describe()}): lower DATALOADER.NUM_WORKERS, 0 needs "
                "none"
            ) from error
        yield _delivered(packed)


def _delivered(packed: Packed) -> Any:
    value = unpack(packed)
    if isinstance(value, DataError | LoaderError):
        raise value
    return value


def _waiting(packed: Packed, num_workers: int) -> int:
    """Bytes of what waits at most: two items a process (torch's default) and the one in use."""
    return packed.buffer.nbytes * (2 * num_workers + 1)


class _Sharing(Dataset):
    """Puts what a process has read into shared memory, or an error that says why it cannot.

    torch's queue would do so in a thread, which prints what goes wrong and sends nothing: the
    trainer would wait for ever.
    """

    def __init__(self, reader: Dataset) -> None:
        self.reader = reader

    def __getitem__(self, item: Any) -> Packed:
        packed = self.reader[item]
        worker = get_worker_info()
        if worker is None or not packed.buffer.nbytes:
            return packed
        try:
            packed.buffer.share_memory_()
        except (RuntimeError, OSError):
            size, waiting = packed.buffer.nbytes, _waiting(packed, worker.num_workers)
            return pack(
                LoaderError(
                    f"a batch of {megabytes(size)} cannot be handed over: {describe()}, and "
                    f"{worker.num_workers} processes need {megabytes(waiting)} (enlarge it, in "
                    "Docker with --shm-size, or set DATALOADER.NUM_WORKERS 0)"
                )
            )
        return packed


def _tells_of_death(error: Exception) -> bool:
    """Whether a process has died, as opposed to an error raised in one and passed on."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error) or "Pin memory thread" in str(error)
    # The process died between announcing a batch and handing over its shared memory.
    return "in DataLoader worker process" not in str(error)


def _as_it_is(packed: Any) -> Any:
    return packed


# Whether a process can tell who sent it a signal (Linux can, macOS cannot).
_SENDER_IS_KNOWN = hasattr(signal, "sigtimedwait")


# What a closed terminal sends to the whole job; not on Windows.
_HANG_UP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()


def _outlive_signals(worker: int) -> None:
    """Signals to the whole job are the trainer's to serve: its last step still needs a batch."""
    for number in (signal.SIGINT, *_HANG_UP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """End this process when the trainer is gone, or sends SIGTERM, as Python does at its exit.

    PyTorch's own watch is over the fork server, which lives as long as any process that it forked.
    """
    trainer = multiprocessing.parent_process()
    while trainer is not None and trainer.is_alive():
        if _SENDER_IS_KNOWN:
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer.pid:
                break
        else:
            trainer.join()
    os._exit(0)


def _context(modules: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Processes that inherit neither threads nor a GPU context, which a fork would break.

    The modules, and torch with them, are imported once in the server, not in every process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    if _SENDER_IS_KNOWN:
        _start_fork_server()
    return context


def _start_fork_server() -> None:
    """Start it, if it does not run, with signals blocked, which it and its forks inherit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANG_UP)
    try:
        # It would unblock SIGTERM when it is started by the next call but one.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
