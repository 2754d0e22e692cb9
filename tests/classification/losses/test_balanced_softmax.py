import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.balanced_softmax import (
    BalancedSoftmax,
    BalancedSoftmaxOptions,
    logit_adjusted_loss,
    post_hoc_logits,
)

COUNTS = [500, 120, 30, 8, 2]


@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0, 1.3])
def test_logit_adjusted_loss_equals_a_softmax_weighted_by_powers_of_counts(by_hand, batch, tau):
    expected = 0.0
    for row, label in by_hand.rows(batch):
        scores = [count**tau * math.exp(x) for count, x in zip(COUNTS, row, strict=True)]
        expected += -math.log(scores[label] / sum(scores)) / 40
    result = logit_adjusted_loss(*batch, log_prior(COUNTS), tau=tau)
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_logit_adjusted_loss_at_a_uniform_prior_is_cross_entropy(batch):
    result = logit_adjusted_loss(*batch, log_prior([7] * len(COUNTS)))
    torch.testing.assert_close(result, F.cross_entropy(*batch))


def test_post_hoc_logits_undo_the_training_prior(batch):
    # A softmax that has learned p(y|x) π_y / Z is brought back to p(y|x).
    probabilities = torch.softmax(batch[0], 1)
    learned = (probabilities * torch.tensor(COUNTS)).log()
    restored = torch.softmax(post_hoc_logits(learned, log_prior(COUNTS)), 1)
    torch.testing.assert_close(restored, probabilities, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tau", [math.inf, math.nan])
def test_logit_adjustment_refuses_tau(tau):
    with pytest.raises(ValueError, match="tau"):
        post_hoc_logits(torch.zeros(1, 2), torch.zeros(2), tau=tau)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_balanced_softmax_adds_the_log_prior(by_hand, logits, labels, shares, tau):
    criterion = BalancedSoftmax(by_hand.COUNTS, BalancedSoftmaxOptions(tau=tau))
    log_priors = [math.log(p) for p in by_hand.PRIORS]
    shifted = logits + tau * torch.tensor(log_priors, dtype=torch.float64)
    loss = criterion(logits, labels, progress=0.0).item()
    rows = by_hand.TARGETS
    assert loss == pytest.approx(by_hand.cross_entropy(shifted, rows), rel=1e-6)
    mixed = criterion(logits, shares, progress=0.0).item()
    assert mixed == pytest.approx(by_hand.cross_entropy(shifted, shares.tolist()), rel=1e-6)
