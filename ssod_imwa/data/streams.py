"""Streams of images in several views, which all methods of both tasks read.

    images = DetectionImages.labeled(dataset)
    order = partial(BatchStream, [np.arange(len(images))])
    views = {"weak": WeakView(...), "strong": On("weak", StrongView())}
    streams = [Stream("labeled", images, order, batch_size=16, views=views)]
    for batch in build_train_batches(streams, schedule, seed=1, num_workers=4)(0):
        batch["labeled"].views["strong"]

A task says how its images are read and transformed in a small class, `FileImages` or
`MemoryImages`; `loader` makes batches of any streams.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from ssod_imwa.data.batches import Part
from ssod_imwa.data.order import MakeOrder
from ssod_imwa.errors import DataError

_T = TypeVar("_T")


@dataclass(frozen=True)
class On:
    """A view that is made from another view of the same image instead of the stored image.

    Attributes:
        base: name of the other view, which stands before this one.
        transform: what is applied to it.
    """

    base: str
    transform: Any


Views = Mapping[str, Any]  # a view's name -> its transform, or `On` another view


@dataclass(frozen=True)
class Stream:
    """Images that a method reads beside others, in views of its own.

    Attributes:
        name: "labeled" or "unlabeled"; part of what seeds order and transforms.
        dataset: where the images come from; the task's own class.
        order: makes the order of a member, for instance `partial(BatchStream, groups)`.
        batch_size: images of an iteration over all processes.
        views: by name, in the order in which they are made: a transform, or one `On` another view.
            The task's data set says what a transform is.
    """

    name: str
    dataset: FileImages | MemoryImages
    order: MakeOrder
    batch_size: int
    views: Views

    def __post_init__(self) -> None:
        if not len(self.dataset):
            raise DataError(f"{self.dataset.name} has no images (at least one is needed)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size} is not allowed (must be at least 1)")
        if not self.views:
            raise ValueError("no views are not allowed (at least one is needed)")
        names = list(self.views)
        for number, (name, view) in enumerate(self.views.items()):
            if isinstance(view, On) and view.base not in names[:number]:
                raise ValueError(
                    f"view {name!r} on {view.base!r} is not allowed (must be on one before it: "
                    f"{names[:number]})"
                )


class Step(NamedTuple):
    """What one process reads of one stream; all but `positions` may seed transforms."""

    stream: str
    seed: int | None
    """Of the run; None for test images, whose views draw nothing."""
    member: int
    t: int
    """The member's own iteration."""
    size: int
    """Images of all processes together."""
    positions: list[int]
    """In the data set, of this process."""
    slots: Sequence[int]
    """Places in the global batch, of this process."""
    form: int = 0
    """Which form of the stream is read: 0 is that of all members, m + 1 member m's own."""


class FileImages(ABC):
    """A data set of files, which processes read and transform one by one.

    Attributes:
        name: of the data set, for messages.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def shared(self) -> FileImages:
        """The same, with what would be copied into every process in memory that they share."""

    def reading(self) -> AbstractContextManager[None]:
        """Entered while the images of a step are made."""
        return nullcontext()

    @abstractmethod
    def make(self, index: int, slot: int, step: Step, views: Views) -> dict[str, Any]:
        """All views of image `index` at a slot of a step.

        Raises:
            DataError: the image cannot be read.
        """

    @abstractmethod
    def join(self, samples: list[dict[str, Any]], indices: torch.Tensor) -> Part:
        """The views of several images as a part of a batch."""


class MemoryImages(ABC):
    """A data set in memory, whose images are transformed a batch at a time where they are.

    Attributes:
        name: of the data set, for messages.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def make(self, step: Step, views: Views) -> Part:
        """The images of a step in all views."""


def make_views(views: Views, stored: _T, transform: Callable[[int, Any, _T], _T]) -> dict[str, _T]:
    """All views of an image, or of a batch of images.

    Args:
        views: see `Stream`.
        stored: what views are made from that are not `On` another one.
        transform: a view's number, its transform and what that is applied to -> the view.

    Example:
        >>> views = {"weak": 10, "strong": On("weak", 100)}
        >>> make_views(views, 1, lambda number, factor, image: factor * image + number)
        {'weak': 10, 'strong': 1001}
    """
    made: dict[str, _T] = {}
    for number, (name, view) in enumerate(views.items()):
        if isinstance(view, On):
            made[name] = transform(number, view.transform, made[view.base])
        else:
            made[name] = transform(number, view, stored)
    return made


def select_views(views: Views, names: Sequence[str]) -> dict[str, Any]:
    """The views that are named, and those that they are made from, in the order of all.

    Raises:
        ValueError: there is no view of a name.

    Example:
        >>> views = {"weak": 1, "other": 2, "strong": On("weak", 3)}
        >>> list(select_views(views, ["strong"]))
        ['weak', 'strong']
    """
    for name in names:
        if name not in views:
            raise ValueError(f"view {name!r} is not allowed (must be one of {list(views)})")
    wanted = set(names)
    for name, view in reversed(list(views.items())):
        if name in wanted and isinstance(view, On):
            wanted.add(view.base)
    return {name: view for name, view in views.items() if name in wanted}
