import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

from ssod_imwa.detection.losses import (
    aligned_iou,
    box_loss,
    multiclass_focal_loss,
    quality_focal_loss,
    weighted_cross_entropy,
)


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


def quality_focal_by_hand(logit, target, beta):
    p = 1 / (1 + math.exp(-logit))
    cross_entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
    return abs(target - p) ** beta * cross_entropy


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_loss_equals_the_formula_element_by_element(beta):
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(40, generator=generator, dtype=torch.float64)
    targets = torch.rand(40, generator=generator, dtype=torch.float64)
    targets[:10] = 0
    losses = quality_focal_loss(logits, targets, beta=beta)
    expected = [
        quality_focal_by_hand(*pair, beta)
        for pair in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)


def test_quality_focal_loss_has_the_gradient_of_both_factors():
    logits = torch.randn(20, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(20, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, targets), (logits,))


@pytest.mark.parametrize("logit", [0.0, 60.0, -60.0, 1e4, -1e4])
def test_quality_focal_loss_of_equal_predictions_is_zero_and_of_others_finite(logit):
    logits = torch.tensor([logit, -logit, logit], requires_grad=True)
    targets = torch.tensor([logit, -logit, 0.0]).sigmoid()
    losses = quality_focal_loss(logits, targets)
    assert losses[:2].tolist() == [0, 0]
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_aligned_iou_is_the_diagonal_of_all_ious():
    generator = torch.Generator().manual_seed(3)
    corners = 40 * torch.rand(2, 50, 2, 2, generator=generator, dtype=torch.float64)
    boxes, others = corners.sort(dim=2).values.flatten(2)
    torch.testing.assert_close(aligned_iou(boxes, others), box_iou(boxes, others).diag())
    assert aligned_iou(boxes, boxes).tolist() == pytest.approx([1] * 50)
    nothing = torch.zeros(1, 4)
    assert aligned_iou(nothing, nothing).tolist() == [0]


def weighted_by_hand(logits, labels, weights):
    total = 0.0
    for row, label, weight in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        top = max(row)
        total += weight * (math.log(sum(math.exp(x - top) for x in row)) + top - row[label])
    return total / max(sum(weights.tolist()), 1.0)


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_weighted_cross_entropy_is_the_formula_row_by_row(rows, scale):
    generator = torch.Generator().manual_seed(rows)
    logits = 4 * torch.randn(rows, 21, generator=generator, dtype=torch.float64)
    labels = torch.randint(21, (rows,), generator=generator)
    weights = scale * torch.rand(rows, generator=generator, dtype=torch.float64)
    expected = weighted_by_hand(logits, labels, weights)
    assert weighted_cross_entropy(logits, labels, weights).item() == pytest.approx(expected)


def test_background_of_weight_1_counts_fully_and_of_weight_0_not_at_all():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=generator)
    labels = torch.randint(4, (30,), generator=generator)
    objects = labels < 3
    whole = F.cross_entropy(logits, labels)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(30)), whole)
    alone = F.cross_entropy(logits[objects], labels[objects])
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, objects.float()), alone)


def test_no_gradient_flows_through_the_weights():
    logits = torch.randn(5, 3, requires_grad=True)
    weights = torch.rand(5, requires_grad=True)
    weighted_cross_entropy(logits, torch.arange(5) % 3, weights).backward()
    assert weights.grad is None
    assert logits.grad.abs().sum() > 0
