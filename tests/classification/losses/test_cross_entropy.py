import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.cross_entropy import (
    CrossEntropy,
    CrossEntropyOptions,
    weighted_cross_entropy,
)


def test_cross_entropy_takes_labels_and_shares(by_hand, logits, labels, shares):
    criterion = CrossEntropy(by_hand.COUNTS, CrossEntropyOptions())
    loss = criterion(logits, labels, progress=0.0).item()
    assert loss == pytest.approx(by_hand.cross_entropy(logits, by_hand.TARGETS))
    mixed = criterion(logits, shares, progress=0.0).item()
    assert mixed == pytest.approx(by_hand.cross_entropy(logits, shares.tolist()))


# Epoch 160 of 200 of the public code; 3 of 4 epochs done is before 0.8, 4 of 5 is not.
@pytest.mark.parametrize(
    ("done", "of", "weighted"),
    [
        (0, 200, False),
        (159, 200, False),
        (160, 200, True),
        (199, 200, True),
        (3, 4, False),
        (4, 5, True),
        (8, 10, True),
        (24, 30, True),
        (23, 30, False),
    ],
)
def test_drw_weights_classes_from_0_8_of_training_on(by_hand, logits, labels, done, of, weighted):
    criterion = CrossEntropy(
        by_hand.COUNTS, CrossEntropyOptions(weights="effective_number", weights_from=0.8)
    )
    loss = criterion(logits, labels, progress=done / of).item()
    by_class = by_hand.effective_weights(0.9999) if weighted else (1.0, 1.0, 1.0)
    expected = by_hand.cross_entropy(logits, by_hand.TARGETS, weights=by_class)
    assert loss == pytest.approx(expected, rel=1e-6)


DRW = CrossEntropyOptions(weights="effective_number", weights_from=0.8)


@pytest.mark.parametrize(("progress", "weighted"), [(0.79, False), (0.8, True)])
def test_drw_weights_mixed_labels_too(by_hand, logits, shares, progress, weighted):
    loss = CrossEntropy(by_hand.COUNTS, DRW)(logits, shares, progress=progress).item()
    weights = by_hand.effective_weights(0.9999) if weighted else (1.0, 1.0, 1.0)
    expected = by_hand.cross_entropy(logits, shares.tolist(), weights=weights)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_weighted_shares_of_mixup_are_its_two_weighted_losses(batch):
    """As public codes have it: λ CE(y) + (1 − λ) CE(y of the partner), each with its own mean."""
    logits, labels = batch
    weight = torch.tensor([0.2, 0.5, 1.0, 1.3, 2.0], dtype=torch.float64)
    partners = labels[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    two = F.one_hot(torch.stack([labels, partners]), 5).double()
    loss = weighted_cross_entropy(logits, 0.3 * two[0] + 0.7 * two[1], weight)
    first, second = (F.cross_entropy(logits, y, weight=weight) for y in (labels, partners))
    torch.testing.assert_close(loss, 0.3 * first + 0.7 * second)


def test_weighted_shares_of_one_class_each_are_labels_also_smoothed(batch):
    logits, labels = batch
    weight = torch.tensor([0.2, 0.5, 1.0, 1.3, 2.0], dtype=torch.float64)
    shares = F.one_hot(labels, 5).double()
    loss = weighted_cross_entropy(logits, shares, weight, smoothing=0.1)
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
