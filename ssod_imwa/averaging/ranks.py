"""Which processes of a run train which member, share a batch, and exchange averages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Processes that talk to each other; a group of one process says everything to itself.

    All processes of a group call the same methods in the same order.

    Args:
        rank: number of this process in the group, 0..size-1.
        size: processes in the group.
        process_group: torch.distributed's group of these processes; None is that of the whole run,
            and of no meaning where size is 1.

    Raises:
        ValueError: rank is not in 0..size-1.

    Example:
        >>> group = Group()
        >>> group.is_main, group.any_true(False), group.all_gather("here")
        (True, False, ['here'])
    """

    rank: int = 0
    size: int = 1
    process_group: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank = {self.rank} is not allowed (must be in 0..{self.size - 1})")

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the group: it writes the files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.process_group)

    def all_true(self, flag: Tensor | bool) -> bool:
        """Whether the flag is true in every process."""
        if self.size == 1:
            return bool(flag)
        # copy: the reduction is in place and the flag is the caller's.
        message = torch.as_tensor(flag).to(self._device(), dtype=torch.int32, copy=True)
        dist.all_reduce(message, op=dist.ReduceOp.MIN, group=self.process_group)
        return bool(message)

    def any_true(self, flag: Tensor | bool) -> bool:
        """Whether the flag is true in at least one process."""
        return not self.all_true(torch.logical_not(torch.as_tensor(flag)))

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable values of all processes, in rank order, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """The contiguous tensors of all processes, equal in shape and type, in rank order."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.process_group)
        return parts

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (size * n, ...), in rank order and without gradients.

        Args:
            rows: (n, ...), of equal shape in every process; one process gets them back as they are.
        """
        if self.size == 1:
            return rows
        return torch.cat(self.gather_tensors(rows.detach().contiguous()))

    def broadcast(self, message: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor in CPU memory by that of process number `source`."""
        if self.size == 1:
            return
        group = dist.group.WORLD if self.process_group is None else self.process_group
        assert group is not None  # more than one process: there is a group
        # NCCL only moves GPU memory; elsewhere this is the message itself.
        moved = message.to(self._device())
        dist.broadcast(moved, src=dist.get_global_rank(group, source), group=group)
        message.copy_(moved)

    def mean(self, number: Tensor) -> Tensor:
        """The mean of the processes' scalars of floating point, in every process."""
        if self.size == 1:
            return number
        # clone: the reduction is in place and the number is the caller's.
        total = number.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total / self.size

    def assert_equal(self, value: Any, what: str) -> None:
        """Raise in every process when a picklable value differs between processes.

        Raises:
            RuntimeError: with the values and their ranks.
        """
        values = self.all_gather(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"rank {rank}: {other!r}" for rank, other in enumerate(values))
            raise RuntimeError(f"{what} must be equal on all ranks, but is not ({listed})")

    def raise_together(self, error: Exception | None) -> None:
        """Raise this process's error, if it has one, and have all others raise, too.

        Raises:
            RuntimeError: another process has an error.
        """
        errors = self.all_gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed, so that no rank goes on: {text}")

    def _device(self) -> torch.device:
        """Where small messages have to be: NCCL only moves GPU memory."""
        if dist.get_backend(self.process_group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """Place of this process in a run: who trains its member with it, and who trains the others.

    Where members are trained in turn, all processes share every member's batch and nobody exchanges
    averages. Where M members are trained at once, W / M processes share the batch of each of them.
    An object instead of questions to torch.distributed, so that members in turn and at once, data
    parallelism and a single process are the same code.

    Attributes:
        run: all processes.
        batch: those that train the same member, each on its part of the batch.
        exchange: one process for each member trained at once, in the members' order.
        member: which of the members trained at once is this process's.
        members: how many are trained at once, 1 where members are trained in turn.

    Example:
        >>> Ranks.alone().batch.size
        1
    """

    run: Group = Group()
    batch: Group = Group()
    exchange: Group = Group()
    member: int = 0
    members: int = 1

    @classmethod
    def alone(cls) -> Ranks:
        """One process that trains everything."""
        return cls()

    @classmethod
    def of_run(cls, members: int = 1) -> Ranks:
        """The place of this process among those that torch.distributed connects, if it does.

        Only what starts a run asks for it, once in every process; everything else is handed it.

        Args:
            members: M, how many members are trained at once, a divisor of the number of processes.

        Raises:
            ValueError: M members cannot be spread evenly over the processes.
        """
        run = Group()
        if dist.is_available() and dist.is_initialized():
            run = Group(dist.get_rank(), dist.get_world_size())
        if members < 1 or run.size % members:
            raise ValueError(
                f"members = {members} on {run.size} ranks is not allowed (must divide the ranks)"
            )
        if members == 1:
            return cls(run, run)
        size = run.size // members
        member = run.rank // size
        batch = _join([range(m * size, (m + 1) * size) for m in range(members)], run.rank)
        exchange = _join([range(i, run.size, size) for i in range(size)], run.rank)
        return cls(run, batch, exchange, member, members)


def _join(all_ranks: Sequence[range], rank: int) -> Group:
    """The group of this rank, of several that are made at once."""
    joined = Group()
    for ranks in all_ranks:
        # Every process takes part in making every group, also those that it is not in.
        process_group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if rank in ranks:
            joined = Group(ranks.index(rank), len(ranks), process_group)
    return joined
