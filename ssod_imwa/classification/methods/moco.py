"""MoCo beside each of several experts (He et al., arXiv 1911.05722), as in NCL and ECL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.losses.collaborative import info_nce_loss
from ssod_imwa.classification.methods.expert_network import (
    CollaborativeNetwork,
    ContrastiveBranch,
)
from ssod_imwa.classification.models.feature_queue import FeatureQueue
from ssod_imwa.config.options import Options, option
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.teacher import Teacher


@dataclass(frozen=True)
class MoCoOptions(Options):
    """The contrastive loss of experts; the defaults are CIFAR's."""

    temperature: float = option(0.2, "T of the cosines", above=0)
    queue: int = option(
        1024, "rows of each expert's queue, at least a batch; 65536 on large sets", low=1
    )
    momentum: float = option(0.999, "momentum of the key network", low=0, high=1, decay=True)
    width: int = option(64, "width of queries and keys; 1024 on large sets", low=1)
    legacy_key_head: bool = option(
        False, "never move the key heads from random weights, as NCL's public code does"
    )


class ExpertContrast:
    """A momentum encoder and a queue for each expert, and the contrastive loss of all.

    A query's positive is the key of its image's other view; its negatives are the expert's queue,
    which the step's own keys enter after the step. The key network moves after each step, too,
    which is the same as MoCo's update at the start of the next one. On several ranks its batch
    norms see images of all of them (shuffle-BN), and each rank's queue holds the keys of all.

    Args:
        network: on its device, with query heads.
        options: see there. Queues hold at least a batch of all ranks and begin with random
            directions; key heads begin as copies and follow like the encoders, if not legacy.
        seed: of the queues' first content.

    Attributes:
        key: the key network. Its parameters follow the query's and get no gradients; the statistics
            of its batch norms, which are in training mode, are its own.
        queues: one for each expert.

    Raises:
        ValueError: the network has no query heads.
    """

    key: ContrastiveBranch

    def __init__(
        self,
        network: CollaborativeNetwork,
        options: MoCoOptions,
        *,
        seed: int = 0,
    ) -> None:
        if network.projections is None:
            raise ValueError("width = 0 is not allowed with a contrastive loss (must be above 0)")
        self.temperature = options.temperature
        device = next(network.parameters()).device
        followed = nn.ModuleList() if options.legacy_key_head else network.projections
        self._follower = Teacher(network.branch(followed), options.momentum, buffers="skip")
        self.key = self._follower.model.train()
        if options.legacy_key_head:
            self.key.projections = network.new_projections().to(device).requires_grad_(False)
        self.queues = [
            FeatureQueue(
                options.queue,
                network.width,
                generator=counted_generator(seed, "queue", k),
                device=device,
            )
            for k in range(network.deployed.num_experts)
        ]
        self._new: list[torch.Tensor] = []

    def loss(
        self,
        queries: torch.Tensor,
        images: torch.Tensor,
        t: int,
        processes: Group = Group(),
    ) -> torch.Tensor:
        """The sum of the experts' InfoNCE; the keys wait for `after_step`.

        Args:
            queries: (K, B, width), rows of length 1, of the images' first view.
            images: (B, 3, H, W), the second view.
            t: the member's own iteration.
            processes: those that have the other parts of the batch.
        """
        keys, of_whole_batch = self._keys(images, t, processes)
        self._new.append(of_whole_batch)
        losses = [
            info_nce_loss(query, key, queue.features, temperature=self.temperature)
            for query, key, queue in zip(queries, keys, self.queues, strict=True)
        ]
        return torch.stack(losses).sum()

    def after_step(self, t: int) -> None:
        """Write the keys of all micro-batches into the queues, and move the key network."""
        for keys in self._new:
            for queue, rows in zip(self.queues, keys, strict=True):
                queue.write_(rows)
        self._new.clear()
        self._follower.follow(t)

    def state_dict(self) -> dict[str, Any]:
        """The queues; the key network is one of the method's models."""
        return {f"queue_{k}": queue.state_dict() for k, queue in enumerate(self.queues)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state is of another number of experts, or of queues of another size.
        """
        if len(state) != len(self.queues):
            raise ValueError(
                f"{len(state)} queues do not fit {len(self.queues)} experts (must be one for each)"
            )
        for k, queue in enumerate(self.queues):
            queue.load_state_dict(state[f"queue_{k}"])
        self._new.clear()

    @torch.no_grad()
    def _keys(
        self, images: torch.Tensor, t: int, processes: Group
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (K, B, width) of the images, and those of all processes' images."""
        if processes.size == 1:
            keys = self.key(images)
            return keys, keys
        # Shuffle-BN: a query and its key must not share the statistics of their batch. The order is
        # a function of the step, so that all know it.
        together = processes.gather_rows(images)
        numbers = counted_generator("shuffle", t, len(self._new)).permutation(len(together))
        order = torch.from_numpy(numbers).to(images.device)
        first = processes.rank * len(images)
        mine = slice(first, first + len(images))
        shuffled = self.key(together[order[mine]])
        everyones = processes.gather_rows(shuffled.transpose(0, 1))[order.argsort()].transpose(0, 1)
        return everyones[:, mine], everyones
