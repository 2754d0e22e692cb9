import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import (
    effective_number_weights,
    ldam_margins,
    log_odds,
    log_prior,
    smoothing_by_class,
)
from ssod_imwa.classification.losses import (
    balanced_bce_loss,
    focal_loss,
    gml_loss,
    label_aware_smoothing_loss,
    ldam_loss,
    logit_adjusted_loss,
    post_hoc_logits,
)

COUNTS = [500, 120, 30, 8, 2]
CLASSES = len(COUNTS)

# Each loss with its settings for COUNTS, as a function of logits and labels alone.
LOSSES = {
    "focal": lambda z, y: focal_loss(z, y, gamma=1.5),
    "ldam": lambda z, y: ldam_loss(z, y, ldam_margins(COUNTS)),
    "logit_adjusted": lambda z, y: logit_adjusted_loss(z, y, log_prior(COUNTS)),
    "smoothing": lambda z, y: label_aware_smoothing_loss(
        z, y, smoothing_by_class(COUNTS, head=0.4, tail=0.1)
    ),
    "balanced_bce": lambda z, y: balanced_bce_loss(z, y, log_odds(COUNTS)),
    "gml": lambda z, y: gml_loss(z, y, log_prior(COUNTS)),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (40,), generator=generator)


def softmax_by_hand(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def rows(batch):
    logits, labels = batch
    return list(zip(logits.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_equals_the_formula_row_by_row(batch, gamma):
    expected = 0.0
    for row, label in rows(batch):
        p = softmax_by_hand(row)[label]
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


@pytest.mark.parametrize("weighted", [False, True])
def test_ldam_loss_equals_the_formula_row_by_row(batch, weighted):
    logits, labels = batch
    cosines = torch.tanh(logits)
    margins, weights = ldam_margins(COUNTS).tolist(), effective_number_weights(COUNTS, beta=0.99)
    total = divisor = 0.0
    for row, label in rows((cosines, labels)):
        scores = [30 * (x - (margins[c] if c == label else 0)) for c, x in enumerate(row)]
        weight = weights[label].item() if weighted else 1.0
        total += weight * -math.log(softmax_by_hand(scores)[label])
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


@pytest.mark.parametrize("tau", [-0.5, 0.0, 1.0, 1.3])
def test_logit_adjusted_loss_equals_a_softmax_weighted_by_powers_of_counts(batch, tau):
    expected = 0.0
    for row, label in rows(batch):
        scores = [count**tau * math.exp(x) for count, x in zip(COUNTS, row, strict=True)]
        expected += -math.log(scores[label] / sum(scores)) / 40
    result = logit_adjusted_loss(*batch, log_prior(COUNTS), tau=tau)
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_logit_adjusted_loss_at_a_uniform_prior_is_cross_entropy(batch):
    result = logit_adjusted_loss(*batch, log_prior([7] * CLASSES))
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


def test_label_aware_smoothing_equals_the_formula_row_by_row(batch):
    smoothing = smoothing_by_class(COUNTS, head=0.4, tail=0.1)
    expected = 0.0
    for row, label in rows(batch):
        losses = [-math.log(p) for p in softmax_by_hand(row)]
        share = smoothing[label].item()
        expected += ((1 - share) * losses[label] + share * sum(losses) / CLASSES) / 40
    assert label_aware_smoothing_loss(*batch, smoothing).item() == pytest.approx(expected)


def test_label_aware_smoothing_of_equal_classes_is_torchs(batch):
    result = label_aware_smoothing_loss(*batch, torch.full((CLASSES,), 0.2))
    reference = F.cross_entropy(*batch, label_smoothing=0.2)
    torch.testing.assert_close(result, reference, rtol=1e-6, atol=0)


def test_balanced_bce_equals_the_formula_entry_by_entry(batch):
    total = sum(COUNTS)
    expected = 0.0
    for row, label in rows(batch):
        for c, (x, count) in enumerate(zip(row, COUNTS, strict=True)):
            odds = math.exp(x) * count / (total - count)
            p = odds / (1 + odds)
            expected += -math.log(p if c == label else 1 - p) / 40
    assert balanced_bce_loss(*batch, log_odds(COUNTS)).item() == pytest.approx(expected, rel=1e-6)


def test_balanced_bce_is_linear_in_mixed_targets(batch):
    logits, labels = batch
    first, second = F.one_hot(labels, CLASSES), F.one_hot(labels.flip(0), CLASSES)
    mixed = balanced_bce_loss(logits, 0.7 * first + 0.3 * second, log_odds(COUNTS))
    apart = 0.7 * balanced_bce_loss(logits, labels, log_odds(COUNTS))
    apart = apart + 0.3 * balanced_bce_loss(logits, labels.flip(0), log_odds(COUNTS))
    torch.testing.assert_close(mixed, apart, rtol=1e-6, atol=0)


def test_balanced_bce_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets of shape \(1, 3\)"):
        balanced_bce_loss(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(2))


def test_gml_equals_the_formula_class_by_class(batch):
    by_class = {}
    for row, label in rows(batch):
        scores = [count * math.exp(x) for count, x in zip(COUNTS, row, strict=True)]
        p = min(1.0, max(1e-5, scores[label] / sum(scores)))
        by_class.setdefault(label, []).append(p)
    expected = 0.0
    for values in by_class.values():
        expected += -math.log(sum(values) / len(values)) / len(by_class)
    assert gml_loss(*batch, log_prior(COUNTS)).item() == pytest.approx(expected, rel=1e-6)


def test_gml_ignores_classes_that_the_batch_lacks(batch):
    logits = batch[0][:6]
    labels = torch.tensor([1, 1, 1, 3, 3, 3])
    p = torch.softmax(logits + torch.tensor(COUNTS).log(), 1)
    expected = -(p[:3, 1].mean().log() + p[3:, 3].mean().log()) / 2
    torch.testing.assert_close(
        gml_loss(logits, labels, log_prior(COUNTS)), expected, rtol=1e-6, atol=0
    )


def test_gml_of_one_class_is_minus_log_of_its_mean_probability():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    p = torch.softmax(logits, 1)[:, 0]
    result = gml_loss(logits, torch.tensor([0, 0]), log_prior([4, 4]))
    torch.testing.assert_close(result, -p.mean().log(), rtol=1e-6, atol=0)


def test_gml_of_a_hopeless_image_is_the_floor_without_a_gradient():
    logits = torch.tensor([[0.0, 50.0]], requires_grad=True)
    loss = gml_loss(logits, torch.tensor([0]), log_prior([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-5))
    assert logits.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_have_the_numerical_gradient(loss, batch):
    logits = torch.tanh(batch[0][:6]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, batch[1][:6]), (logits,))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_those_of_the_same_numbers(loss, dtype, batch):
    logits, labels = batch[0].to(dtype), batch[1]
    result = loss(logits, labels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(logits.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("size", [1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_losses_of_huge_logits_are_finite(loss, size, dtype):
    logits = torch.full((2, CLASSES), -size, dtype=dtype)
    logits[:, 1] = size
    logits.requires_grad_()
    result = loss(logits, torch.tensor([1, 4]))  # one certainly right, one certainly wrong
    result.backward()
    assert torch.isfinite(result)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_without_images_are_zero_and_connected(loss):
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    result = loss(logits, torch.zeros(0, dtype=torch.int64))
    result.backward()
    assert result.item() == 0
    assert logits.grad.shape == (0, CLASSES)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: focal_loss(z, y, gamma=2.0),
        lambda z, y: logit_adjusted_loss(z, y, log_prior([9])),
        lambda z, y: label_aware_smoothing_loss(z, y, smoothing_by_class([9], head=0.1, tail=0.0)),
        lambda z, y: gml_loss(z, y, log_prior([9])),
    ],
)
def test_one_class_alone_costs_nothing(loss):
    assert loss(torch.tensor([[3.0]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize(
    "loss",
    [ldam_loss, logit_adjusted_loss, label_aware_smoothing_loss, balanced_bce_loss, gml_loss],
)
def test_losses_refuse_numbers_that_are_not_one_a_class(loss):
    with pytest.raises(ValueError, match=r"shape \(3,\) do not fit logits of shape \(1, 2\)"):
        loss(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(3))
