import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import smoothing_by_class
from ssod_imwa.classification.losses.base import SmoothedOptions
from ssod_imwa.classification.losses.label_aware_smoothing import (
    LabelAwareSmoothing,
    label_aware_smoothing_loss,
)

COUNTS = [500, 120, 30, 8, 2]


def test_label_aware_smoothing_equals_the_formula_row_by_row(by_hand, batch):
    smoothing = smoothing_by_class(COUNTS, head=0.4, tail=0.1)
    expected = 0.0
    for row, label in by_hand.rows(batch):
        losses = [-math.log(p) for p in by_hand.softmax(row)]
        share = smoothing[label].item()
        expected += ((1 - share) * losses[label] + share * sum(losses) / len(COUNTS)) / 40
    assert label_aware_smoothing_loss(*batch, smoothing).item() == pytest.approx(expected)


def test_label_aware_smoothing_of_equal_classes_is_torchs(batch):
    result = label_aware_smoothing_loss(*batch, torch.full((len(COUNTS),), 0.2))
    reference = F.cross_entropy(*batch, label_smoothing=0.2)
    torch.testing.assert_close(result, reference, rtol=1e-6, atol=0)


def test_label_aware_smoothing_smooths_frequent_classes_most(by_hand, logits, labels):
    criterion = LabelAwareSmoothing(by_hand.COUNTS, SmoothedOptions([0.4, 0.1]))
    loss = criterion(logits, labels, progress=0.0).item()
    expected = 0.0
    for row, y in zip(logits.tolist(), by_hand.LABELS, strict=True):
        logs = by_hand.log_softmax(row)
        smoothing = 0.1 + 0.3 * math.sin(math.pi / 2 * (by_hand.COUNTS[y] - 5) / 295)
        expected -= ((1 - smoothing) * logs[y] + smoothing * sum(logs) / 3) / 6
    assert loss == pytest.approx(expected, rel=1e-6)


def test_smoothing_is_two_numbers_and_largest_for_the_most_frequent_class(by_hand):
    with pytest.raises(ValueError, match=r"smoothing = \[0.1\] .* \(must be two numbers"):
        LabelAwareSmoothing(by_hand.COUNTS, SmoothedOptions([0.1]))
    with pytest.raises(ValueError, match=r"head = 0.1, tail = 0.2"):
        LabelAwareSmoothing(by_hand.COUNTS, SmoothedOptions([0.1, 0.2]))
