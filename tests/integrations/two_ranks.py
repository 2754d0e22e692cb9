"""Run by test_ranks.py on each of two processes: a stock trainer under IMWA, data parallel."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer, hooks
from torch import nn

from ssod_imwa.averaging.ranks import Ranks
from ssod_imwa.integrations.detectron2 import IMWAHook


class Losses(nn.Module):
    """A detectron2 model is called with a batch and returns losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layers(batch)[:, 0] - batch.sum(1)).square().mean()}


def loader():
    """Each rank its own stream, from the generators that IMWAHook seeds."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + torch.distributed.get_rank())
    while True:
        yield torch.randn(4, 3, generator=generator)


def work(folder: str, ranks: Ranks) -> int:
    """Train and save what this rank ends with."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Losses(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    trainer = SimpleTrainer(model, loader(), optimizer)
    hook = IMWAHook(6, members=2, episodes=2, build_loader=loader)
    trainer.register_hooks([hooks.LRScheduler(optimizer, scheduler), hook])
    trainer.train(0, 12)
    torch.save(model.module.state_dict(), Path(folder) / f"rank{ranks.run.rank}.pth")
    return 0
