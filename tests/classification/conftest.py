"""Runs on digits, and a toy network with batches of random images to measure something on."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.data.batches import Part


class Net(ImageClassifier):
    """Two groups with batch norm, features of width 5, three classes."""

    group_names = ("stem", "layer1")

    def __init__(self):
        super().__init__()
        self.num_features = 5
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
        self.classifier = nn.Linear(5, 3)


def build(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        model(torch.randn(16, 3, 8, 8))  # statistics that are not those of the start
    return model.eval()


def images_and_labels(number=10):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(number, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 3, (number,), generator=generator)


def batches(images, labels, size=4):
    """In an order that is not the data set's, as several processes deliver them."""
    order = torch.arange(len(labels)).flip(0)
    return [Part({"image": images[at]}, labels[at], at) for at in order.split(size)]


@pytest.fixture
def config(digits_config):
    """A function that loads a run of seconds on long-tailed digits, changed by KEY VALUE pairs."""
    return partial(
        digits_config,
        *("CLS.IMBALANCE.RATIO", 20, "SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", 0.1),
        *("SOLVER.WARMUP_ITERS", 1, "SOLVER.IMS_PER_BATCH", 16),
    )


@pytest.fixture
def toy():
    return SimpleNamespace(
        net=lambda seed=0: build(Net, seed),
        experts=lambda seed=0: build(lambda: Experts(Net, 2), seed),
        images_and_labels=images_and_labels,
        batches=batches,
    )
