"""What is called between the batches of a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import TestBatches

# Called with how many batches are done and how many there are; what it raises ends the evaluation.
Poll = Callable[[int, int], object]


def polled(
    batches: TestBatches | Sequence[Part], processes: Group, poll: Poll | None
) -> Iterator[Part]:
    """Batches, with a call after each of them.

    Slices of a data set differ by an image, so that processes may differ by a batch. `poll` is
    called equally often in each, so that it may talk to the others.

    Args:
        batches: of this process.
        processes: those that have the other batches.
        poll: None calls nothing.
    """
    if poll is None:
        yield from batches
        return
    total = max(processes.all_gather(len(batches)))
    for done, batch in enumerate(batches, start=1):
        yield batch
        poll(done, total)
    for done in range(len(batches) + 1, total + 1):
        poll(done, total)
