import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_odds
from ssod_imwa.classification.losses.balanced_bce import (
    BalancedBCE,
    balanced_bce_loss,
)
from ssod_imwa.classification.losses.base import SmoothedOptions

COUNTS = [500, 120, 30, 8, 2]


def test_balanced_bce_equals_the_formula_entry_by_entry(by_hand, batch):
    total = sum(COUNTS)
    expected = 0.0
    for row, label in by_hand.rows(batch):
        for c, (x, count) in enumerate(zip(row, COUNTS, strict=True)):
            odds = math.exp(x) * count / (total - count)
            p = odds / (1 + odds)
            expected += -math.log(p if c == label else 1 - p) / 40
    assert balanced_bce_loss(*batch, log_odds(COUNTS)).item() == pytest.approx(expected, rel=1e-6)


def test_balanced_bce_is_linear_in_mixed_targets(batch):
    logits, labels = batch
    first, second = F.one_hot(labels, len(COUNTS)), F.one_hot(labels.flip(0), len(COUNTS))
    mixed = balanced_bce_loss(logits, 0.7 * first + 0.3 * second, log_odds(COUNTS))
    apart = 0.7 * balanced_bce_loss(logits, labels, log_odds(COUNTS))
    apart = apart + 0.3 * balanced_bce_loss(logits, labels.flip(0), log_odds(COUNTS))
    torch.testing.assert_close(mixed, apart, rtol=1e-6, atol=0)


def test_balanced_bce_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets of shape \(1, 3\)"):
        balanced_bce_loss(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(2))


def bce(logits, targets, priors):
    total = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        for x, q, prior in zip(row, target, priors, strict=True):
            p = 1 / (1 + math.exp(-(x + math.log(prior) - math.log(1 - prior))))
            total -= q * math.log(p) + (1 - q) * math.log(1 - p)
    return total / len(targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_are_not_rounded_to_the_type_of_the_logits(by_hand, logits, shares, dtype):
    """As under AMP, where logits are of half precision and what was mixed is not."""
    criterion = BalancedBCE(by_hand.COUNTS, SmoothedOptions(smoothing=[0.1, 0.0]))
    logits = logits.to(dtype)
    smooth = [[0.9 * q + 0.1 / 3 for q in row] for row in shares.tolist()]
    loss = criterion(logits, shares, progress=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(bce(logits, smooth, by_hand.PRIORS), rel=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_bce_takes_labels_and_shares_and_smooths_both(
    by_hand, logits, labels, shares, smoothing
):
    criterion = BalancedBCE(by_hand.COUNTS, SmoothedOptions(smoothing=[smoothing, 0.0]))
    for targets, rows in (
        (labels, by_hand.TARGETS),
        (shares, shares.tolist()),
    ):
        smooth = [[(1 - smoothing) * q + smoothing / 3 for q in row] for row in rows]
        loss = criterion(logits, targets, progress=0.0).item()
        assert loss == pytest.approx(bce(logits, smooth, by_hand.PRIORS), rel=1e-6)
