import pytest
import torch

from ssod_imwa.classification.class_counts import (
    ldam_margins,
    log_odds,
    log_prior,
    smoothing_by_class,
)
from ssod_imwa.classification.losses.balanced_bce import balanced_bce_loss
from ssod_imwa.classification.losses.balanced_softmax import logit_adjusted_loss
from ssod_imwa.classification.losses.build import LOSSES
from ssod_imwa.classification.losses.focal import focal_loss
from ssod_imwa.classification.losses.gml import gml_loss
from ssod_imwa.classification.losses.label_aware_smoothing import label_aware_smoothing_loss
from ssod_imwa.classification.losses.ldam import ldam_loss

COUNTS = [500, 120, 30, 8, 2]

# Each loss with its settings for COUNTS, as a function of logits and labels alone.
PURE = {
    "focal": lambda z, y: focal_loss(z, y, gamma=1.5),
    "ldam": lambda z, y: ldam_loss(z, y, ldam_margins(COUNTS)),
    "logit_adjusted": lambda z, y: logit_adjusted_loss(z, y, log_prior(COUNTS)),
    "smoothing": lambda z, y: label_aware_smoothing_loss(
        z, y, smoothing_by_class(COUNTS, head=0.4, tail=0.1)
    ),
    "balanced_bce": lambda z, y: balanced_bce_loss(z, y, log_odds(COUNTS)),
    "gml": lambda z, y: gml_loss(z, y, log_prior(COUNTS)),
}


@pytest.mark.parametrize("loss", PURE.values(), ids=PURE)
def test_losses_have_the_numerical_gradient(loss, batch):
    logits = torch.tanh(batch[0][:6]).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, batch[1][:6]), (logits,))


@pytest.mark.parametrize("loss", PURE.values(), ids=PURE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_those_of_the_same_numbers(loss, dtype, batch):
    logits, labels = batch[0].to(dtype), batch[1]
    result = loss(logits, labels)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, loss(logits.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("loss", PURE.values(), ids=PURE)
@pytest.mark.parametrize("size", [1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_losses_of_huge_logits_are_finite(loss, size, dtype):
    logits = torch.full((2, len(COUNTS)), -size, dtype=dtype)
    logits[:, 1] = size
    logits.requires_grad_()
    result = loss(logits, torch.tensor([1, 4]))  # one certainly right, one certainly wrong
    result.backward()
    assert torch.isfinite(result)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", PURE.values(), ids=PURE)
def test_losses_without_images_are_zero_and_connected(loss):
    logits = torch.zeros(0, len(COUNTS), requires_grad=True)
    result = loss(logits, torch.zeros(0, dtype=torch.int64))
    result.backward()
    assert result.item() == 0
    assert logits.grad.shape == (0, len(COUNTS))


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


def make(name, counts, **settings):
    return LOSSES[name](counts, LOSSES[name].options_class(**settings))


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax"])
def test_smoothing_spreads_its_share_over_all_classes(by_hand, logits, labels, name):
    loss = make(name, by_hand.COUNTS, smoothing=[0.3, 0.0])(logits, labels, progress=0.0).item()
    if name == "balanced_softmax":
        logits = logits + torch.tensor(by_hand.PRIORS, dtype=torch.float64).log()
    targets = [[0.7 * q + 0.3 / 3 for q in by_hand.one_hot(y)] for y in by_hand.LABELS]
    assert loss == pytest.approx(by_hand.cross_entropy(logits, targets), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(by_hand, logits, labels, name, dtype):
    criterion, half = make(name, by_hand.COUNTS), logits.to(dtype)
    loss = criterion(half, labels, progress=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(criterion(half.double(), labels, progress=0.0).item(), 1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax", "balanced_bce"])
def test_shares_of_one_class_each_are_labels(by_hand, logits, labels, name):
    criterion = make(name, by_hand.COUNTS, smoothing=[0.1, 0.0])
    assert criterion.takes_shares
    shares = torch.tensor(by_hand.TARGETS)
    of_labels, of_shares = (criterion(logits.float(), y, progress=0.0) for y in (labels, shares))
    torch.testing.assert_close(of_shares, of_labels)


def test_shares_are_not_taken_by_the_other_losses(by_hand):
    others = set(LOSSES) - {"cross_entropy", "balanced_softmax", "balanced_bce"}
    assert not any(make(name, by_hand.COUNTS).takes_shares for name in others)


def test_class_statistics_move_with_the_module_and_are_not_saved(by_hand):
    criterion = make("ldam", by_hand.COUNTS, weights="effective_number").to("meta")
    assert [b.device.type for b in criterion.buffers()] == ["meta", "meta"]
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cross_entropy", {"weights": "inverse"}, "weights = 'inverse' is not allowed"),
        ("cross_entropy", {"beta": 1.0}, "beta = 1.0"),
        ("cross_entropy", {"weights_from": 1.1}, "weights_from = 1.1"),
        ("cross_entropy", {"smoothing": [-0.1, 0.0]}, r"smoothing = \[-0.1, 0.0\]"),
        ("focal", {"gamma": -1.0}, "gamma = -1.0"),
        ("ldam", {"margin": -0.1}, "margin = -0.1"),
        ("ldam", {"scale": 0.0}, "scale = 0.0"),
        ("balanced_bce", {"smoothing": [1.0, 0.0]}, r"smoothing = \[1.0, 0.0\]"),
        ("balanced_bce", {"smoothing": [0.1, 0.1]}, "all classes are smoothed alike"),
        ("label_aware_smoothing", {"smoothing": [1.0, 0.0]}, r"smoothing = \[1.0, 0.0\]"),
    ],
)
def test_options_refuse_what_is_unknown_or_out_of_range(by_hand, name, settings, message):
    with pytest.raises(ValueError, match=message):
        make(name, by_hand.COUNTS, **settings)
