"""Classification's images as streams read them: in memory, or in files.

Images in memory are moved to the device once and transformed there, a batch at a time, so that a
small network does not wait for processes that transform image by image. Files are read and
transformed by processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.large_views import LargeView
from ssod_imwa.classification.data.samplers import stream_counts
from ssod_imwa.classification.data.small_views import BatchView
from ssod_imwa.data.batches import Part
from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.streams import FileImages, MemoryImages, Step, Views, make_views
from ssod_imwa.data.transfer import SharedRecords
from ssod_imwa.engine.seeding import counted_generator, counted_seed


def open_images(
    dataset: ClassificationDataset, device: torch.device | str
) -> ImagesInFiles | ImagesInMemory:
    """A data set as streams read it.

    Args:
        dataset: images in memory or in files.
        device: where images in memory are kept and transformed; those of files come on the CPU.
    """
    if dataset.images is None:
        return ImagesInFiles(dataset.name, dataset.files, dataset.labels)
    return ImagesInMemory(dataset, device)


class ImagesInMemory(MemoryImages):
    """Images as one tensor, in views of `small_view`.

    Args:
        dataset: in memory.
        device: where they are kept and transformed.
    """

    def __init__(self, dataset: ClassificationDataset, device: torch.device | str = "cpu") -> None:
        assert dataset.images is not None  # see `open_images`
        self.name = dataset.name
        self.images = dataset.images.to(device)
        self.labels = dataset.labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def make(self, step: Step, views: Views) -> Part:
        indices = torch.tensor(step.positions).to(self.images.device, non_blocking=True)

        def transform(number: int, view: BatchView, images: torch.Tensor) -> torch.Tensor:
            return view(images, _numbers(number, view, step))

        return Part(
            make_views(views, self.images[indices], transform), self.labels[indices], indices
        )


def _numbers(number: int, view: BatchView, step: Step) -> torch.Tensor:
    """Uniform numbers for the step's images; a process draws them for all and takes its own."""
    if not view.numbers:
        return torch.empty(len(step.positions), 0, dtype=torch.float64)
    if step.seed is None:
        raise ValueError(f"{type(view).__name__} is not allowed for testing (it is random)")
    name = stream_counts(step.stream)
    generator = counted_generator(step.seed, "view", *name, number, step.member, step.t)
    numbers = generator.random((step.size, view.numbers))
    return torch.from_numpy(numbers[list(step.slots)])


class ImagesInFiles(FileImages):
    """Images as files, in views of `large_view`.

    Args:
        name: of the data set.
        files: paths.
        labels: int64 (N,).
    """

    def __init__(self, name: str, files: Sequence[str], labels: torch.Tensor) -> None:
        self.name = name
        self.files = files
        self.labels = labels

    def __len__(self) -> int:
        return len(self.files)

    def shared(self) -> ImagesInFiles:
        # Hundreds of thousands of paths would be copied into every process.
        return ImagesInFiles(self.name, SharedRecords(self.files), self.labels)

    @contextmanager
    def reading(self) -> Iterator[None]:
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

    def make(self, index: int, slot: int, step: Step, views: Views) -> dict[str, Any]:
        name = stream_counts(step.stream)

        def transform(number: int, view: LargeView, image: torch.Tensor) -> torch.Tensor:
            if step.seed is not None:
                _seed(step.seed, "view", *name, number, step.member, step.t, slot)
            return view(image)

        return make_views(views, read_image(self.files[index]), transform)

    def join(self, samples: list[dict[str, Any]], indices: torch.Tensor) -> Part:
        views = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return Part(views, self.labels[indices], indices)


def _seed(*counts: int | str) -> None:
    """As `seed_everything`, but on the CPU alone: a GPU's generator is the trainer's."""
    seed = counted_seed(*counts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
