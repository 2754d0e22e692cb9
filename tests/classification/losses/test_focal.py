import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.focal import Focal, FocalOptions, focal_loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_equals_the_formula_row_by_row(by_hand, batch, gamma):
    expected = 0.0
    for row, label in by_hand.rows(batch):
        p = by_hand.softmax(row)[label]
        expected += (1 - p) ** gamma * -math.log(p) / 40
    assert focal_loss(*batch, gamma=gamma).item() == pytest.approx(expected)


def test_focal_loss_at_gamma_0_is_cross_entropy(batch):
    torch.testing.assert_close(focal_loss(*batch, gamma=0.0), F.cross_entropy(*batch))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [60.0, 1e4, -1e4])
def test_focal_loss_of_certain_predictions_has_a_finite_gradient(gamma, margin):
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), gamma=gamma)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("gamma", [-1.0, math.inf, math.nan])
def test_focal_loss_refuses_gamma(gamma):
    with pytest.raises(ValueError, match=r"gamma = .* is not allowed"):
        focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=gamma)


def test_focal_has_its_gamma(by_hand, logits, labels):
    loss = Focal(by_hand.COUNTS, FocalOptions(gamma=2.0))(logits, labels, progress=0.0).item()
    logs = [
        by_hand.log_softmax(row)[y] for row, y in zip(logits.tolist(), by_hand.LABELS, strict=True)
    ]
    assert loss == pytest.approx(sum(-((1 - math.exp(p)) ** 2) * p for p in logs) / 6)
