import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.detection.losses import box_loss, multiclass_focal_loss


def focal_by_hand(logits, labels, gamma):
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        top = max(row)
        exponentials = [math.exp(x - top) for x in row]
        p = exponentials[label] / sum(exponentials)
        total += (1 - p) ** gamma * -math.log(p)
    return total / len(labels)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
def test_focal_loss_equals_the_formula_row_by_row(gamma):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 21, generator=generator, dtype=torch.float64)
    labels = torch.randint(21, (50,), generator=generator)
    expected = focal_by_hand(logits, labels, gamma)
    assert multiclass_focal_loss(logits, labels, gamma=gamma).item() == pytest.approx(expected)


def test_focal_loss_is_cross_entropy_at_gamma_0():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 5, generator=generator, requires_grad=True)
    labels = torch.randint(5, (30,), generator=generator)
    (ours,) = torch.autograd.grad(multiclass_focal_loss(logits, labels, gamma=0.0), logits)
    (reference,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(ours, reference)


def test_focal_loss_has_the_numerical_gradient():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(
        lambda x: multiclass_focal_loss(x, labels, gamma=1.5), (logits,)
    )


@pytest.mark.parametrize("margin", [50.0, 1e4, -1e4])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_focal_loss_of_certain_predictions_is_finite(gamma, margin):
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = multiclass_focal_loss(logits, torch.tensor([0]), gamma=gamma)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_losses_without_rows_are_zero_and_connected():
    logits = torch.zeros(0, 3, requires_grad=True)
    deltas = torch.zeros(0, 4, requires_grad=True)
    loss = multiclass_focal_loss(logits, torch.zeros(0, dtype=torch.int64), gamma=1.5)
    loss = loss + box_loss(deltas, torch.zeros(0, 4), divisor=0, beta=0.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 3)
    assert deltas.grad.shape == (0, 4)


@pytest.mark.parametrize("gamma", [-1.0, 0.5, math.inf, math.nan])
def test_focal_loss_refuses_gamma(gamma):
    with pytest.raises(ValueError, match="gamma"):
        multiclass_focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=gamma)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_box_loss_equals_the_formula_entry_by_entry(beta):
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    expected = 0.0
    for difference in (deltas - targets).flatten().tolist():
        x = abs(difference)
        expected += 0.5 * x * x / beta if x < beta else x - 0.5 * beta
    result = box_loss(deltas, targets, divisor=16, beta=beta)
    assert result.item() == pytest.approx(expected / 16)
