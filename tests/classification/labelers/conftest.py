"""Weak outputs that are a function of a number, and every labeler with small settings."""

from types import SimpleNamespace

import pytest
import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.labelers.acr import ACR, ACROptions
from ssod_imwa.classification.labelers.alignment import Alignment, AlignmentOptions
from ssod_imwa.classification.labelers.base import WeakOutputs
from ssod_imwa.classification.labelers.darp import DARP, DARPOptions
from ssod_imwa.classification.labelers.daso import DASO, DASOOptions
from ssod_imwa.classification.labelers.threshold import Threshold, ThresholdOptions

COUNTS = [30, 10, 4]
UNLABELED, IMAGES, WIDTH = 12, 5, 4
TAIL = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]  # CIFAR-10, N1 = 500, ratio 100


def weak(number, *, images=IMAGES, scale=4.0):
    """Outputs of `images` distinct unlabeled images."""
    generator = torch.Generator().manual_seed(number)
    classes = len(COUNTS)
    return WeakOutputs(
        logits=scale * torch.randn(images, classes, generator=generator),
        features=torch.randn(images, WIDTH, generator=generator),
        indices=torch.randperm(UNLABELED, generator=generator)[:images],
        tested_logits=scale * torch.randn(images, classes, generator=generator),
    )


def labeled(number, *, images=6):
    """The teacher's features of labeled images, their labels, and the processes."""
    generator = torch.Generator().manual_seed(1000 + number)
    features = torch.randn(images, WIDTH, generator=generator)
    return features, torch.randint(len(COUNTS), (images,), generator=generator), Group()


MAKERS = {
    "threshold": lambda: Threshold(ThresholdOptions(0.6)),
    "alignment": lambda: Alignment(
        COUNTS, AlignmentOptions(0.6, batches=3), generation=2, generations=3
    ),
    "darp": lambda: DARP(
        COUNTS,
        UNLABELED,
        DARPOptions(0.6, warmup_part=0.25, refine_period=2),
        iterations=8,
    ),
    "daso": lambda: DASO(COUNTS, DASOOptions(0.6, warmup=3, queue=8, window=2), width=WIDTH),
    "acr": lambda: ACR(COUNTS, UNLABELED, ACROptions(0.6, epoch=2, start_epoch=1)),
}


def advance(labeler, t, *, number=None):
    """One step of the labeler at own iteration t, with batches that t or `number` decides."""
    number = t if number is None else number
    if labeler.reads_labeled_features:
        labeler.see_labeled(*labeled(number))
    result = labeler.label(weak(number), t)
    labeler.after_step(t)
    return result


@pytest.fixture
def small():
    """The helpers of this file; test files cannot import one another."""
    return SimpleNamespace(
        COUNTS=COUNTS,
        TAIL=TAIL,
        UNLABELED=UNLABELED,
        WIDTH=WIDTH,
        MAKERS=MAKERS,
        weak=weak,
        labeled=labeled,
        advance=advance,
    )


@pytest.fixture(params=sorted(MAKERS))
def make_labeler(request):
    """A function that makes each of the labelers, one after the other."""
    return MAKERS[request.param]
