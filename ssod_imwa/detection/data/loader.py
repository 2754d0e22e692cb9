"""Batches for every global step from one data loader, the same with any number of processes.

One loader serves all members: the schedule says in advance who trains when, so no process starts or
stops between members. Its processes are started once and live until the run's last batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.data.order import DataOrder, Kind, SampleKey, ScheduleSampler, hashed
from ssod_imwa.data.transfer import Packed, SharedRecords, pack
from ssod_imwa.data.workers import deliveries
from ssod_imwa.detection.data.records import DetectionBatch, DetectionDataset, ImageRecord, Sample
from ssod_imwa.detection.data.views import ImageTransform, TestView, make_sample, read_record
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)

# So many unreadable images in a row are no longer broken records but a missing disk.
MAX_REPLACEMENTS = 10


@dataclass
class TestImage:
    """An image to run a detector on.

    Attributes:
        record: what was read.
        image: uint8 (3, H, W), RGB.
        matrix: float64 (3, 3), maps pixels of the stored image to pixels of `image`.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    record: ImageRecord
    image: torch.Tensor
    matrix: torch.Tensor


def build_train_batches(
    labeled: DetectionDataset,
    unlabeled: DetectionDataset | None,
    schedule: EpisodeSchedule,
    *,
    seed: int,
    batch_labeled: int,
    batch_unlabeled: int,
    weak: ImageTransform,
    strong: ImageTransform,
    num_workers: int,
    aspect_ratio_grouping: bool,
    on_bad_record: Literal["error", "skip"],
    first_member: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Callable[[int], Iterator[DetectionBatch]]:
    """The training batches of a run, from any global step on.

    Which images a batch holds and how they are augmented is a function of (seed, member, own
    iteration, slot) alone: the same batches come whatever the start, `num_workers`, E and
    `world_size` are.

    Args:
        labeled: images with annotations.
        unlabeled: images whose annotations, if any, are ignored; None for supervised training.
        schedule: which member trains when.
        seed: run seed.
        batch_labeled: labeled images of an iteration over all ranks.
        batch_unlabeled: unlabeled images of an iteration over all ranks; 0 for none.
        weak: makes the weak view from the stored image.
        strong: makes the strong view from the weak one.
        num_workers: processes that read and augment; 0 does it in this one. About two batches per
            process wait in shared memory.
        aspect_ratio_grouping: batches hold only wide (w > h) or only other images.
        on_bad_record: what an unreadable image does: "error" raises, "skip" puts the next readable
            image of the member's own stream in its place and logs a warning, once for each path.
        first_member: number of the schedule's member 0.
        rank: this process; it gets slots rank, rank + world_size, ... of each batch.
        world_size: number of processes that train.
        pin_memory: deliver tensors in page-locked memory, for faster copies to a GPU.

    Returns:
        `batches(start)`, an iterator over the batches of global steps start..len(schedule)-1. It
        raises DataError at an unreadable image and LoaderError if a process dies.

    Raises:
        DataError: a data set is empty or a labeled image has no annotations.
        ValueError: an argument is out of range.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record = {on_bad_record!r} is not allowed (error or skip)")
    datasets: dict[Kind, tuple[DetectionDataset, int]] = {"labeled": (labeled, batch_labeled)}
    if unlabeled is not None and batch_unlabeled:
        hidden = unlabeled.subset(range(len(unlabeled)), labeled=False)
        datasets["unlabeled"] = (hidden, batch_unlabeled)
    for dataset, _ in datasets.values():
        if not len(dataset):
            raise DataError(f"{dataset.name} has no images (training needs at least one)")
    for record in labeled.records:
        if record.annotations is None:
            raise DataError(f"{record.file_name} of {labeled.name} has no annotations")
    orders = {
        kind: DataOrder(
            dataset.records,
            batch_size,
            kind=kind,
            seed=seed,
            aspect_ratio_grouping=aspect_ratio_grouping,
        )
        for kind, (dataset, batch_size) in datasets.items()
    }
    reader = _TrainReader(
        {kind: _shared(dataset.records, num_workers) for kind, (dataset, _) in datasets.items()},
        orders,
        weak=weak,
        strong=strong,
        seed=seed,
        skip_bad_records=on_bad_record == "skip",
    )
    reported: set[str] = set()

    def batches(start: int) -> Iterator[DetectionBatch]:
        sampler = ScheduleSampler(
            schedule,
            list(orders.values()),
            first_member=first_member,
            start=start,
            rank=rank,
            world_size=world_size,
        )
        delivered = deliveries(reader, sampler, num_workers=num_workers, pin_memory=pin_memory)
        return _report_replacements(delivered, reported)

    return batches


def build_test_batches(
    dataset: DetectionDataset,
    *,
    view: TestView,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterable[list[TestImage]]:
    """The images of a data set in its order, once for each `iter()` of the returned object.

    Args:
        dataset: what to read.
        view: resizes the images.
        batch_size: images of a batch; the last one may be smaller.
        num_workers: processes that read; 0 does it in this one.
        rank: this process; it gets images rank, rank + world_size, ...
        world_size: number of processes that share the data set.
        pin_memory: deliver tensors in page-locked memory, for faster copies to a GPU.

    Returns:
        An iterable with a length. Iterating raises DataError at an unreadable image: a figure over
        a part of the images would be taken for one over all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} is not allowed (must be at least 1)")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank} is not allowed (must be 0..{world_size - 1})")
    own = range(rank, len(dataset), world_size)
    positions = [list(own[i : i + batch_size]) for i in range(0, len(own), batch_size)]
    reader = _TestReader(_shared(dataset.records, num_workers), view)
    return _TestBatches(reader, positions, num_workers=num_workers, pin_memory=pin_memory)


@dataclass
class _TestBatches:
    reader: _TestReader
    positions: list[list[int]]
    num_workers: int
    pin_memory: bool

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[list[TestImage]]:
        return deliveries(
            self.reader, self.positions, num_workers=self.num_workers, pin_memory=self.pin_memory
        )


# -------------------------------------------------------------------- what runs in the processes


class _TrainReader(Dataset):
    """Makes the samples of a global step, given their keys."""

    def __init__(
        self,
        records: dict[Kind, Sequence[ImageRecord]],
        orders: dict[Kind, DataOrder],
        *,
        weak: ImageTransform,
        strong: ImageTransform,
        seed: int,
        skip_bad_records: bool,
    ) -> None:
        self.records = records
        self.orders = orders
        self.weak = weak
        self.strong = strong
        self.seed = seed
        self.skip_bad_records = skip_bad_records

    def __getitem__(self, keys: list[SampleKey]) -> Packed:
        replaced: dict[str, str] = {}
        samples: dict[Kind, list[Sample]] = {"labeled": [], "unlabeled": []}
        try:
            for key in keys:
                samples[key.kind].append(self._read(key, replaced))
        except DataError as error:
            return pack(error)
        return pack((DetectionBatch(**samples), replaced))

    def _read(self, key: SampleKey, replaced: dict[str, str]) -> Sample:
        candidate = key
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            record = self.records[key.kind][candidate.index]
            try:
                return make_sample(record, self.weak, self.strong, self._generator(key))
            except DataError as error:
                if not self.skip_bad_records:
                    raise
                replaced[record.file_name] = str(error)
            candidate = self.orders[key.kind].replacement(key, attempt)
        raise DataError(
            f"{MAX_REPLACEMENTS} {key.kind} images in a row cannot be read, the last is "
            f"{record.file_name}; is the disk still there?"
        )

    def _generator(self, key: SampleKey) -> Any:
        return counted_generator(self.seed, "views", hashed(key.kind), key.member, key.t, key.slot)


class _TestReader(Dataset):
    """Makes test images, given their positions."""

    def __init__(self, records: Sequence[ImageRecord], view: TestView) -> None:
        self.records = records
        self.view = view

    def __getitem__(self, positions: list[int]) -> Packed:
        images = []
        try:
            for position in positions:
                record = self.records[position]
                images.append(TestImage(record, *self.view(read_record(record))))
        except DataError as error:
            return pack(error)
        return pack(images)


def _shared(records: Sequence[ImageRecord], num_workers: int) -> Sequence[ImageRecord]:
    return SharedRecords(records) if num_workers and len(records) else records


def _report_replacements(delivered: Iterator[Any], reported: set[str]) -> Iterator[DetectionBatch]:
    for batch, replaced in delivered:
        for path, reason in replaced.items():
            if path not in reported:
                logger.warning("%s; the next image of the same stream takes its place", reason)
                reported.add(path)
        yield batch
