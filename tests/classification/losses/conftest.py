"""Logits of long-tailed classes, and losses computed number by number."""

import math
from types import SimpleNamespace

import pytest
import torch

# Six images of three classes, for criteria; forty of five, for the pure functions.
COUNTS = [300, 40, 5]
LABELS = [0, 0, 1, 2, 0, 1]
PRIORS = [n / sum(COUNTS) for n in COUNTS]


def softmax(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def log_softmax(row):
    return [x - math.log(sum(map(math.exp, row))) for x in row]


def one_hot(label):
    return [float(c == label) for c in range(3)]


def rows(batch):
    logits, labels = batch
    return list(zip(logits.tolist(), labels.tolist(), strict=True))


def cross_entropy(logits, targets, *, weights=(1.0, 1.0, 1.0)):
    """The mean over images, by weight, of rows of targets."""
    top = bottom = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        logs = log_softmax(row)
        top -= sum(w * q * p for w, q, p in zip(weights, target, logs, strict=True))
        bottom += sum(w * q for w, q in zip(weights, target, strict=True))
    return top / bottom


def effective_weights(beta):
    weights = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [w * 3 / sum(weights) for w in weights]


@pytest.fixture
def by_hand():
    """The helpers of this file; test files cannot import one another."""
    return SimpleNamespace(
        COUNTS=COUNTS,
        LABELS=LABELS,
        PRIORS=PRIORS,
        TARGETS=[one_hot(label) for label in LABELS],
        softmax=softmax,
        log_softmax=log_softmax,
        one_hot=one_hot,
        rows=rows,
        cross_entropy=cross_entropy,
        effective_weights=effective_weights,
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (40,), generator=generator)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.tensor(LABELS)


@pytest.fixture
def shares():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(1)
