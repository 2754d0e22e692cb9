"""Batches of streams for every global step, the same with any number of processes.

Which images a batch holds and how they are transformed is a function of (seed, stream, member, own
iteration, slot) alone: the same batches come whatever the start, the number of processes that read
or train, and the number of episodes are. One loader reads all streams of files for all members: the
schedule says in advance who trains when, so its processes are started once and live until the run's
last batch. Streams in memory are made where their images are, and need no processes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.data.order import Order
from ssod_imwa.data.shared_memory import fitting_workers
from ssod_imwa.data.streams import FileImages, MemoryImages, Step, Stream, Views
from ssod_imwa.data.transfer import Packed, pack
from ssod_imwa.data.workers import deliveries
from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)

# So many unreadable images in a row are no longer broken records but a missing disk.
MAX_REPLACEMENTS = 10

OnBadRecord = Literal["error", "skip"]


def build_train_batches(
    streams: Sequence[Stream],
    schedule: EpisodeSchedule,
    processes: Group = Group(),
    *,
    seed: int,
    first_member: int = 0,
    num_workers: int = 0,
    on_bad_record: OnBadRecord = "error",
    pin_memory: bool = False,
    own: Sequence[Sequence[Stream]] = (),
) -> TrainBatches:
    """The training batches of a run, from any global step on.

    Args:
        streams: what a batch holds.
        schedule: which member trains when.
        processes: those that share each batch; number r of n gets slots r, r + n, ... of it, unless
            a stream's order says otherwise.
        seed: run seed.
        first_member: number of the schedule's member 0.
        num_workers: processes that read files; 0 does it in this one, and so does a shared memory
            that is too small: about two batches per process wait in it.
        on_bad_record: what an unreadable file does: "error" raises, "skip" puts the next readable
            image like it in its place (`Order.successor`) and logs a warning for the first file,
            the 10th, the 100th and so on.
        pin_memory: deliver images of files in page-locked memory, for faster copies to a GPU.
        own: the streams of each of the schedule's members, if they have orders or views of their
            own; all else about them is that of `streams`.

    Returns:
        `batches(start)`, an iterator over the batches of global steps start..len(schedule)-1. It
        raises DataError at an unreadable image and LoaderError if a process dies.

    Raises:
        ValueError: an argument is out of range, or a batch cannot be shared out evenly.
    """
    _check_on_bad_record(on_bad_record)
    for stream in streams:
        if stream.batch_size % processes.size:
            raise ValueError(
                f"{stream.name} batch of {stream.batch_size} is not allowed on {processes.size} "
                "processes (must be a multiple)"
            )
    forms = {group[0].name: group for group in zip(streams, *own, strict=True)}
    steps = {
        name: _Steps([_Orders(form, seed) for form in group], schedule, processes, first_member)
        for name, group in forms.items()
    }
    num_workers = fitting_workers(num_workers)
    reader = _Reader(
        {
            stream.name: _FileStream(
                stream.dataset.shared() if num_workers else stream.dataset,
                [form.views for form in forms[stream.name]],
                steps[stream.name].orders if on_bad_record == "skip" else None,
            )
            for stream in streams
            if isinstance(stream.dataset, FileImages)
        }
    )
    return TrainBatches(forms, steps, reader, len(schedule), num_workers, pin_memory)


def build_test_batches(
    dataset: FileImages | MemoryImages,
    transform: Any,
    processes: Group = Group(),
    *,
    batch_size: int,
    num_workers: int = 0,
    on_bad_record: OnBadRecord = "error",
    pin_memory: bool = False,
) -> TestBatches:
    """The images of a data set in its order, in one view with the name "image".

    Args:
        dataset: what to read.
        transform: makes the view, and draws nothing.
        processes: those that share the data set; number r of n gets images r, r + n, ...
        batch_size: images of a batch; the last one may be smaller.
        num_workers: processes that read files; 0 does it in this one.
        on_bad_record: what an unreadable file does: "error" raises, as a figure over a part of the
            test images would be taken for one over all; "skip", for training images, leaves it out
            and logs a warning, once for each file.
        pin_memory: deliver images of files in page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_on_bad_record(on_bad_record)
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} is not allowed (must be at least 1)")
    positions = range(processes.rank, len(dataset), processes.size)
    steps = []
    for first in range(0, len(positions), batch_size):
        part = list(positions[first : first + batch_size])
        steps.append(Step("test", None, 0, 0, len(part), part, range(len(part))))
    skip = on_bad_record == "skip"
    return TestBatches(dataset, {"image": transform}, steps, num_workers, pin_memory, skip=skip)


def _check_on_bad_record(value: str) -> None:
    if value not in get_args(OnBadRecord):
        raise ValueError(f"on_bad_record = {value!r} is not allowed (error or skip)")


class _Orders:
    """The orders of a stream's members, made as they are asked for."""

    def __init__(self, stream: Stream, seed: int) -> None:
        self.stream_name = stream.name
        self.seed = seed
        self._make = stream.order
        self._batch_size = stream.batch_size
        self._members: dict[int, Order] = {}

    def __getitem__(self, member: int) -> Order:
        if member not in self._members:
            self._members[member] = self._make(
                self._batch_size, seed=self.seed, member=member, kind=self.stream_name
            )
        return self._members[member]


@dataclass(frozen=True)
class _Steps:
    """What this process reads of a stream at each global step."""

    orders: Sequence[_Orders]  # of the forms of the stream
    schedule: EpisodeSchedule
    processes: Group
    first_member: int

    def __getitem__(self, global_step: int) -> Step:
        position = self.schedule.position(global_step)
        member = self.first_member + position.member
        differs = len(self.orders) > 1 and position.members > 1
        form = position.member + 1 if differs else 0
        orders, processes = self.orders[form], self.processes
        order = orders[member]
        batch = order.batch(position.t)
        slots = order.slots(position.t, rank=processes.rank, size=processes.size)
        return Step(
            orders.stream_name,
            orders.seed,
            member,
            position.t,
            len(batch),
            [batch[slot] for slot in slots],
            slots,
            form,
        )


class TrainBatches:
    """The batches of global steps from any of them on.

    Attributes:
        sizes: images of a batch in each stream, over all processes.
    """

    def __init__(
        self,
        forms: Mapping[str, Sequence[Stream]],
        steps: Mapping[str, _Steps],
        reader: _Reader,
        global_steps: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.sizes = {name: group[0].batch_size for name, group in forms.items()}
        self._forms = forms
        self._steps = steps
        self._reader = reader
        self._global_steps = global_steps
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._reported: set[str] = set()

    def __call__(self, start: int) -> Iterator[Batch]:
        if not 0 <= start <= self._global_steps:
            raise ValueError(f"start = {start} is not allowed (must be 0..{self._global_steps})")
        return self._batches(range(start, self._global_steps))

    def _batches(self, global_steps: range) -> Iterator[Batch]:
        for (from_files, unreadable), global_step in zip(
            self._read_files(global_steps), global_steps, strict=False
        ):
            self._report(unreadable)
            yield Batch(
                {
                    name: from_files[name]
                    if name in from_files
                    else self._from_memory(name, global_step)
                    for name in self._forms
                }
            )

    def _from_memory(self, name: str, global_step: int) -> Part:
        step = self._steps[name][global_step]
        stream = self._forms[name][step.form]
        assert isinstance(stream.dataset, MemoryImages), "the reader has all others"
        return stream.dataset.make(step, stream.views)

    def _read_files(self, global_steps: range) -> Iterator[tuple[Batch, list[str]]]:
        """What comes from files at each step, and what is wrong with files that were replaced."""
        names = list(self._reader.streams)
        if not names:
            return itertools.repeat((Batch(), []))
        steps = ([self._steps[name][global_step] for name in names] for global_step in global_steps)
        return _deliveries(self._reader, steps, self._num_workers, self._pin_memory)

    def _report(self, unreadable: list[str]) -> None:
        """Log the first one, and how many there are when these are ten times as many."""
        for reason in unreadable:
            if reason in self._reported:
                continue
            self._reported.add(reason)
            count = len(self._reported)
            if count == 10 ** (len(str(count)) - 1):
                which = "" if count == 1 else f"{count} images cannot be read, this is the last: "
                logger.warning(
                    "%s%s; the next image of the same stream takes its place", which, reason
                )


class TestBatches:
    """The parts of a data set, read anew by each `iter()`.

    Iterating raises DataError at an unreadable image, or leaves it out and raises one if none can
    be read; see `build_test_batches`.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(
        self,
        dataset: FileImages | MemoryImages,
        views: Views,
        steps: list[Step],
        num_workers: int,
        pin_memory: bool,
        *,
        skip: bool,
    ) -> None:
        self._dataset = dataset
        self._views = views
        self._steps = steps
        self._skip = skip
        self._left_out: set[str] = set()
        self._num_workers = num_workers = fitting_workers(num_workers)
        self._pin_memory = pin_memory
        if steps and num_workers and isinstance(dataset, FileImages):
            self._dataset = dataset.shared()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Part]:
        if isinstance(self._dataset, MemoryImages):
            for step in self._steps:
                yield self._dataset.make(step, self._views)
            return
        files = _FileStream(self._dataset, [self._views], None, leave_out=self._skip)
        steps = [[step] for step in self._steps]
        images = 0
        for batch, unreadable in _deliveries(
            _Reader({"test": files}), steps, self._num_workers, self._pin_memory
        ):
            for reason in unreadable:
                if reason not in self._left_out:
                    logger.warning("%s; it is left out", reason)
                    self._left_out.add(reason)
            if len(batch["test"]):
                images += len(batch["test"])
                yield batch["test"]
        if self._left_out and not images:
            raise DataError(
                f"no image of {self._dataset.name} can be read; is the disk still there?"
            )


# -------------------------------------------------------------------- what runs in the processes


@dataclass(frozen=True)
class _FileStream:
    """A stream of files as processes read it.

    Attributes:
        dataset: the files.
        views: what is made of them, in each form of the stream.
        orders: say what replaces an unreadable image, in each form; None raises.
        leave_out: an unreadable image, instead.
    """

    dataset: FileImages
    views: Sequence[Views]
    orders: Sequence[_Orders] | None
    leave_out: bool = False

    def part(self, step: Step, unreadable: list[str]) -> Part:
        """The images of a step; adds what is wrong with those that were replaced or left out."""
        with self.dataset.reading():
            read = [
                self._read(position, slot, step, unreadable)
                for position, slot in zip(step.positions, step.slots, strict=True)
            ]
        made = [image for image in read if image is not None]
        indices = torch.tensor([index for index, _ in made], dtype=torch.int64)
        return self.dataset.join([x for _, x in made], indices) if made else Part({}, None, indices)

    def _read(
        self, index: int, slot: int, step: Step, unreadable: list[str]
    ) -> tuple[int, dict[str, Any]] | None:
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return index, self.dataset.make(index, slot, step, self.views[step.form])
            except DataError as error:
                if self.orders is None and not self.leave_out:
                    raise
                unreadable.append(str(error))
            if self.orders is None:
                return None
            index = self.orders[step.form][step.member].successor(step.t, slot, attempt)
        raise DataError(
            f"{MAX_REPLACEMENTS} {step.stream} images in a row cannot be read, the last: "
            f"{unreadable[-1]}; is the disk still there?"
        )


class _Reader(Dataset):
    """Makes what comes from files at a global step."""

    def __init__(self, streams: Mapping[str, _FileStream]) -> None:
        self.streams = streams

    def __getitem__(self, steps: list[Step]) -> Packed:
        unreadable: list[str] = []
        try:
            batch = Batch(
                {step.stream: self.streams[step.stream].part(step, unreadable) for step in steps}
            )
        except DataError as error:
            return pack(error)
        return pack((batch, unreadable))


def _deliveries(
    reader: _Reader, steps: Iterable[list[Step]], num_workers: int, pin_memory: bool
) -> Iterator[tuple[Batch, list[str]]]:
    # What the task's data sets import takes seconds: once, in the server that forks the processes.
    modules = {type(stream.dataset).__module__ for stream in reader.streams.values()}
    return deliveries(
        reader, steps, num_workers=num_workers, pin_memory=pin_memory, preload=sorted(modules)
    )
