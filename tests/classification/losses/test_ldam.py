import math

import pytest
import torch

from ssod_imwa.classification.class_counts import effective_number_weights, ldam_margins
from ssod_imwa.classification.losses.ldam import LDAM, LDAMOptions, ldam_loss

COUNTS = [500, 120, 30, 8, 2]


@pytest.mark.parametrize("weighted", [False, True])
def test_ldam_loss_equals_the_formula_row_by_row(by_hand, batch, weighted):
    logits, labels = batch
    cosines = torch.tanh(logits)
    margins, weights = ldam_margins(COUNTS).tolist(), effective_number_weights(COUNTS, beta=0.99)
    total = divisor = 0.0
    for row, label in by_hand.rows((cosines, labels)):
        scores = [30 * (x - (margins[c] if c == label else 0)) for c, x in enumerate(row)]
        weight = weights[label].item() if weighted else 1.0
        total += weight * -math.log(by_hand.softmax(scores)[label])
        divisor += weight
    result = ldam_loss(cosines, labels, ldam_margins(COUNTS), weight=weights if weighted else None)
    assert result.item() == pytest.approx(total / divisor)


def test_ldam_loss_leaves_its_inputs_alone(batch):
    cosines, labels = torch.tanh(batch[0]), batch[1]
    before = cosines.clone()
    ldam_loss(cosines, labels, ldam_margins(COUNTS))
    assert torch.equal(cosines, before)


def test_ldam_loss_refuses_a_scale_of_0():
    with pytest.raises(ValueError, match="scale = 0"):
        ldam_loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(2), scale=0)


@pytest.mark.parametrize("weights", ["none", "effective_number"])
def test_ldam_has_its_margins_scale_and_weights(by_hand, logits, labels, weights):
    cosines = logits.tanh()
    criterion = LDAM(by_hand.COUNTS, LDAMOptions(weights, margin=0.4, scale=16.0, beta=0.9))
    loss = criterion(cosines, labels, progress=0.0).item()
    margins = [0.4 * (5 / n) ** 0.25 for n in by_hand.COUNTS]
    shifted = 16.0 * (
        cosines
        - torch.tensor([[margins[y] * q for q in by_hand.one_hot(y)] for y in by_hand.LABELS])
    )
    by_class = by_hand.effective_weights(0.9) if weights != "none" else (1.0, 1.0, 1.0)
    expected = by_hand.cross_entropy(shifted, by_hand.TARGETS, weights=by_class)
    assert loss == pytest.approx(expected, rel=1e-6)
