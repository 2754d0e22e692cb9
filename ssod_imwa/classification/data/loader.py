"""Batches for classification: a function of (seed, member, own iteration, slot), like all batches.

Images in memory are moved to the device once and augmented there, a batch at a time, so that a
small network does not wait for processes that transform image by image. Files are read and
transformed by processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.large_views import LargeView
from ssod_imwa.classification.data.samplers import BatchSource
from ssod_imwa.classification.data.small_views import BatchView
from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.transfer import Packed, SharedRecords, pack
from ssod_imwa.data.workers import deliveries
from ssod_imwa.engine.seeding import counted_generator, counted_seed
from ssod_imwa.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The images of one iteration.

    Attributes:
        views: of the same images, each float32 (B, 3, H, W).
        labels: int64 (B,), 0..C-1.
        indices: int64 (B,), positions in the data set.
    """

    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageBatch:
        return self._map(lambda x: x.to(device, non_blocking=True))

    def split(self, parts: int) -> list[ImageBatch]:
        """Cut into equal micro-batches, for gradient accumulation."""
        if len(self) % parts:
            raise ValueError(f"{len(self)} images cannot be split into {parts} equal parts")
        return [self._map(lambda x, i=i: x[i::parts]) for i in range(parts)]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ImageBatch:
        views = tuple(function(view) for view in self.views)
        return ImageBatch(views, function(self.labels), function(self.indices))


Batches = Callable[[int], Iterator[ImageBatch]]
View = BatchView | LargeView


def build_image_batches(
    dataset: ClassificationDataset,
    schedule: EpisodeSchedule,
    source: Callable[[int], BatchSource],
    views: Sequence[View],
    *,
    seed: int,
    first_member: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    pin_memory: bool = False,
) -> Batches:
    """The training batches of a run, from any global step on.

    Which images a batch holds and how they are augmented is a function of (seed, member, own
    iteration, slot) alone: the same batches come whatever the start, `num_workers`, E and
    `world_size` are.

    Args:
        dataset: images in memory or in files.
        schedule: which member trains when.
        source: member number -> what says which images its iterations read.
        views: of each image, at least one; of `small_view` for images in memory, of `large_view`
            for files.
        seed: run seed, of the views.
        first_member: number of the schedule's member 0.
        num_workers: processes that read files; 0 does it in this one.
        rank: this process; it gets slots rank, rank + world_size, ... of each batch.
        world_size: number of processes that train.
        device: where images in memory are kept and augmented; those of files come on the CPU.
        pin_memory: deliver images of files in page-locked memory.

    Returns:
        `batches(start)`, an iterator over the batches of global steps start..len(schedule)-1. It
        raises DataError at an unreadable image and LoaderError if a process dies.

    Raises:
        DataError: the data set is empty.
        ValueError: an argument is out of range, or a batch cannot be shared out evenly.
    """
    _check(dataset, views, rank=rank, world_size=world_size)
    keys = _KeySource(schedule, source, first_member, rank, world_size)
    if dataset.images is None:
        reader = _reader(dataset, views, seed=seed, num_workers=num_workers)

        def read(start: int) -> Iterator[ImageBatch]:
            steps = keys.steps(start)
            return deliveries(reader, steps, num_workers=num_workers, pin_memory=pin_memory)

        return read
    augmenter = _Augmenter(dataset, views, seed=seed, device=device)

    def augment(start: int) -> Iterator[ImageBatch]:
        return map(augmenter, keys.steps(start))

    return augment


def build_test_image_batches(
    dataset: ClassificationDataset,
    view: View,
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterable[ImageBatch]:
    """The images of a data set in its order, once for each `iter()` of the returned object.

    Args:
        dataset: images in memory or in files.
        view: one that is not random: "none" of `small_view`, "test" of `large_view`.
        batch_size: images of a batch; the last one may be smaller.
        num_workers: processes that read files; 0 does it in this one.
        device: where images in memory are normalized; those of files come on the CPU.
        rank: this process; it gets images rank, rank + world_size, ...
        world_size: number of processes that share the data set.

    Returns:
        An iterable with a length. Iterating raises DataError at an unreadable image: a figure over
        a part of the images would be taken for one over all.

    Raises:
        DataError: the data set is empty.
        ValueError: an argument is out of range, or the view is random.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} is not allowed (must be at least 1)")
    _check(dataset, [view], rank=rank, world_size=world_size)
    if dataset.images is not None and view.numbers:
        raise ValueError(f"{type(view).__name__} is not allowed for testing (it is random)")
    own = range(rank, len(dataset), world_size)
    steps = [
        _Step(0, 0, batch_size, list(own[i : i + batch_size]), range(0))
        for i in range(0, len(own), batch_size)
    ]
    if dataset.images is not None:
        make = partial(_augmented, dataset, view, steps, device)
    else:
        reader = _reader(dataset, [view], seed=None, num_workers=num_workers)
        pin_memory = torch.device(device).type == "cuda"
        make = partial(deliveries, reader, steps, num_workers=num_workers, pin_memory=pin_memory)
    return _TestBatches(make, len(steps))


def _check(
    dataset: ClassificationDataset, views: Sequence[View], *, rank: int, world_size: int
) -> None:
    if not len(dataset):
        raise DataError(f"{dataset.name} has no images (at least one is needed)")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank} is not allowed (must be 0..{world_size - 1})")
    if not views:
        raise ValueError("no views are not allowed (at least one is needed)")
    for view in views:
        _check_kind(view, dataset)


def _check_kind(view: View, dataset: ClassificationDataset) -> None:
    in_memory = dataset.images is not None
    if hasattr(view, "numbers") != in_memory:
        where, maker = ("in memory", "small_view") if in_memory else ("in files", "large_view")
        raise ValueError(
            f"a view of type {type(view).__name__} is not allowed for {dataset.name}, whose images "
            f"are {where} (must be of {maker})"
        )


class _Step(NamedTuple):
    """What a process reads at a global step."""

    member: int
    t: int
    batch_size: int
    """Of all processes together."""
    positions: list[int]
    """In the data set, of this process."""
    slots: range
    """Places in the global batch, of this process."""


class _KeySource:
    """The steps of a schedule."""

    def __init__(
        self,
        schedule: EpisodeSchedule,
        source: Callable[[int], BatchSource],
        first_member: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.schedule = schedule
        self.source = source
        self.first_member = first_member
        self.rank = rank
        self.world_size = world_size
        self._sources: dict[int, BatchSource] = {}
        self._step(0)  # so that a batch that cannot be shared out is refused now

    def steps(self, start: int) -> Iterator[_Step]:
        if not 0 <= start <= len(self.schedule):
            raise ValueError(f"start = {start} is not allowed (must be 0..{len(self.schedule)})")
        return map(self._step, range(start, len(self.schedule)))

    def _step(self, global_step: int) -> _Step:
        position = self.schedule.position(global_step)
        member = self.first_member + position.member
        if member not in self._sources:
            self._sources[member] = self.source(member)
        batch = self._sources[member].batch(position.t)
        if len(batch) % self.world_size:
            raise ValueError(
                f"batch of {len(batch)} is not allowed on {self.world_size} processes (must be a "
                "multiple)"
            )
        slots = range(self.rank, len(batch), self.world_size)
        return _Step(member, position.t, len(batch), batch[self.rank :: self.world_size], slots)


class _Augmenter:
    """Makes batches of images in memory."""

    def __init__(
        self,
        dataset: ClassificationDataset,
        views: Sequence[BatchView],
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)
        self.views = views
        self.seed = seed

    def __call__(self, step: _Step) -> ImageBatch:
        indices = torch.tensor(step.positions).to(self.images.device, non_blocking=True)
        images = self.images[indices]
        views = tuple(
            view(images, self._numbers(number, view, step))
            for number, view in enumerate(self.views)
        )
        return ImageBatch(views, self.labels[indices], indices)

    def _numbers(self, number: int, view: BatchView, step: _Step) -> torch.Tensor:
        if not view.numbers:
            return torch.empty(len(step.positions), 0, dtype=torch.float64)
        generator = counted_generator(self.seed, "view", number, step.member, step.t)
        numbers = generator.random((step.batch_size, view.numbers))
        return torch.from_numpy(numbers[step.slots.start :: step.slots.step])


def _augmented(
    dataset: ClassificationDataset,
    view: BatchView,
    steps: list[_Step],
    device: torch.device | str,
) -> Iterator[ImageBatch]:
    return map(_Augmenter(dataset, [view], seed=0, device=device), steps)


@dataclass
class _TestBatches:
    make: Callable[[], Iterator[ImageBatch]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[ImageBatch]:
        return self.make()


# -------------------------------------------------------------------- what runs in the processes


class _Reader(Dataset):
    """Reads and transforms the files of a step; without a seed for views that draw nothing."""

    def __init__(
        self,
        files: Sequence[str],
        labels: torch.Tensor,
        views: Sequence[LargeView],
        seed: int | None,
    ) -> None:
        self.files = files
        self.labels = labels
        self.views = views
        self.seed = seed

    def __getitem__(self, step: _Step) -> Packed:
        try:
            with _as_in_a_process():
                samples = [self._sample(step, place) for place in range(len(step.positions))]
        except DataError as error:
            return pack(error)
        views = tuple(torch.stack(view) for view in zip(*samples, strict=True))
        indices = torch.tensor(step.positions)
        return pack(ImageBatch(views, self.labels[indices], indices))

    def _sample(self, step: _Step, place: int) -> list[torch.Tensor]:
        image = read_image(self.files[step.positions[place]])
        views = []
        for number, view in enumerate(self.views):
            if self.seed is not None:
                _seed(self.seed, "view", number, step.member, step.t, step.slots[place])
            views.append(view(image))
        return views


def _reader(
    dataset: ClassificationDataset,
    views: Sequence[LargeView],
    *,
    seed: int | None,
    num_workers: int,
) -> _Reader:
    # Hundreds of thousands of paths would be copied into every process.
    files = SharedRecords(dataset.files) if num_workers else dataset.files
    return _Reader(files, dataset.labels, tuple(views), seed)


def _seed(*counts: int | str) -> None:
    """As `seed_everything`, but on the CPU alone: a GPU's generator is the trainer's."""
    seed = counted_seed(*counts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _as_in_a_process() -> Iterator[None]:
    """One thread, which sums alike everywhere, and global generators that are put back."""
    threads = torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
