import math
from typing import get_args

import pytest
import torch

from ssod_imwa.classification.criteria import Criterion, Loss

COUNTS = [300, 40, 5]
TOTAL = sum(COUNTS)
LABELS = [0, 0, 1, 2, 0, 1]
PRIORS = [n / TOTAL for n in COUNTS]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(6, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def shares():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(1)


def log_softmax(row):
    return [x - math.log(sum(map(math.exp, row))) for x in row]


def one_hot(label):
    return [float(c == label) for c in range(3)]


def cross_entropy(logits, targets, *, weights=(1.0, 1.0, 1.0)):
    """The mean over images, by weight, of rows of targets."""
    top = bottom = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        logs = log_softmax(row)
        top -= sum(w * q * p for w, q, p in zip(weights, target, logs, strict=True))
        bottom += sum(w * q for w, q in zip(weights, target, strict=True))
    return top / bottom


def effective_weights(beta):
    weights = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [w * 3 / sum(weights) for w in weights]


def test_cross_entropy_takes_labels_and_shares(logits, shares):
    criterion = Criterion("cross_entropy", COUNTS)
    labels = criterion(logits, torch.tensor(LABELS), progress=0.0).item()
    assert labels == pytest.approx(cross_entropy(logits, [one_hot(y) for y in LABELS]))
    mixed = criterion(logits, shares, progress=0.0).item()
    assert mixed == pytest.approx(cross_entropy(logits, shares.tolist()))


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax"])
def test_smoothing_spreads_its_share_over_all_classes(logits, name):
    criterion = Criterion(name, COUNTS, smoothing=(0.3, 0.0))
    loss = criterion(logits, torch.tensor(LABELS), progress=0.0).item()
    if name == "balanced_softmax":
        logits = logits + torch.tensor(PRIORS, dtype=torch.float64).log()
    targets = [[0.7 * q + 0.3 / 3 for q in one_hot(y)] for y in LABELS]
    assert loss == pytest.approx(cross_entropy(logits, targets), rel=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_balanced_softmax_adds_the_log_prior(logits, shares, tau):
    criterion = Criterion("balanced_softmax", COUNTS, tau=tau)
    shifted = logits + tau * torch.tensor([math.log(p) for p in PRIORS], dtype=torch.float64)
    labels = criterion(logits, torch.tensor(LABELS), progress=0.0).item()
    assert labels == pytest.approx(cross_entropy(shifted, [one_hot(y) for y in LABELS]), rel=1e-6)
    mixed = criterion(logits, shares, progress=0.0).item()
    assert mixed == pytest.approx(cross_entropy(shifted, shares.tolist()), rel=1e-6)


def test_focal_has_its_gamma(logits):
    loss = Criterion("focal", COUNTS, gamma=2.0)(logits, torch.tensor(LABELS), progress=0.0).item()
    logs = [log_softmax(row)[y] for row, y in zip(logits.tolist(), LABELS, strict=True)]
    assert loss == pytest.approx(sum(-((1 - math.exp(p)) ** 2) * p for p in logs) / 6)


@pytest.mark.parametrize("weights", ["none", "effective_number"])
def test_ldam_has_its_margins_scale_and_weights(logits, weights):
    cosines = logits.tanh()
    criterion = Criterion("ldam", COUNTS, largest_margin=0.4, scale=16.0, weights=weights, beta=0.9)
    loss = criterion(cosines, torch.tensor(LABELS), progress=0.0).item()
    margins = [0.4 * (5 / n) ** 0.25 for n in COUNTS]
    shifted = 16.0 * (
        cosines - torch.tensor([[margins[y] * q for q in one_hot(y)] for y in LABELS])
    )
    by_class = effective_weights(0.9) if weights != "none" else (1.0, 1.0, 1.0)
    expected = cross_entropy(shifted, [one_hot(y) for y in LABELS], weights=by_class)
    assert loss == pytest.approx(expected, rel=1e-6)


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
def test_drw_weights_classes_from_0_8_of_the_training_on(logits, done, of, weighted):
    criterion = Criterion("cross_entropy", COUNTS, weights="effective_number", weights_from=0.8)
    loss = criterion(logits, torch.tensor(LABELS), progress=done / of).item()
    by_class = effective_weights(0.9999) if weighted else (1.0, 1.0, 1.0)
    expected = cross_entropy(logits, [one_hot(y) for y in LABELS], weights=by_class)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_label_aware_smoothing_smooths_frequent_classes_most(logits):
    criterion = Criterion("label_aware_smoothing", COUNTS, smoothing=(0.4, 0.1))
    loss = criterion(logits, torch.tensor(LABELS), progress=0.0).item()
    expected = 0.0
    for row, y in zip(logits.tolist(), LABELS, strict=True):
        logs = log_softmax(row)
        smoothing = 0.1 + 0.3 * math.sin(math.pi / 2 * (COUNTS[y] - 5) / 295)
        expected -= ((1 - smoothing) * logs[y] + smoothing * sum(logs) / 3) / 6
    assert loss == pytest.approx(expected, rel=1e-6)


def bce(logits, targets):
    total = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        for x, q, prior in zip(row, target, PRIORS, strict=True):
            p = 1 / (1 + math.exp(-(x + math.log(prior) - math.log(1 - prior))))
            total -= q * math.log(p) + (1 - q) * math.log(1 - p)
    return total / len(targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_bce_takes_labels_and_shares_and_smooths_both(logits, shares, smoothing):
    criterion = Criterion("balanced_bce", COUNTS, smoothing=(smoothing, 0.0))
    for targets, rows in (
        (torch.tensor(LABELS), [one_hot(y) for y in LABELS]),
        (shares, shares.tolist()),
    ):
        smooth = [[(1 - smoothing) * q + smoothing / 3 for q in row] for row in rows]
        loss = criterion(logits, targets, progress=0.0).item()
        assert loss == pytest.approx(bce(logits, smooth), rel=1e-6)


def test_gml_is_the_mean_over_classes_of_log_recalls(logits):
    loss = Criterion("gml", COUNTS)(logits, torch.tensor(LABELS), progress=0.0).item()
    recalls = {0: [], 1: [], 2: []}
    for row, y in zip(logits.tolist(), LABELS, strict=True):
        shifted = [x + math.log(p) for x, p in zip(row, PRIORS, strict=True)]
        recalls[y].append(math.exp(log_softmax(shifted)[y]))
    expected = -sum(math.log(sum(found) / len(found)) for found in recalls.values()) / 3
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", get_args(Loss))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(logits, name, dtype):
    criterion, labels = Criterion(name, COUNTS), torch.tensor(LABELS)
    half = logits.to(dtype)
    loss = criterion(half, labels, progress=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(criterion(half.double(), labels, progress=0.0).item(), 1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "balanced_softmax", "balanced_bce"])
def test_shares_of_one_class_each_are_labels(logits, name):
    criterion = Criterion(name, COUNTS, smoothing=(0.1, 0.0))
    assert criterion.takes_shares
    labels = torch.tensor(LABELS)
    shares = torch.tensor([one_hot(y) for y in LABELS])
    of_labels, of_shares = (criterion(logits.float(), y, progress=0.0) for y in (labels, shares))
    torch.testing.assert_close(of_shares, of_labels)


def test_shares_are_not_taken_with_weights_nor_by_the_other_losses():
    assert not Criterion("cross_entropy", COUNTS, weights="effective_number").takes_shares
    others = set(get_args(Loss)) - {"cross_entropy", "balanced_softmax", "balanced_bce"}
    assert not any(Criterion(name, COUNTS).takes_shares for name in others)


def test_class_statistics_move_with_the_module_and_are_not_saved():
    criterion = Criterion("ldam", COUNTS, weights="effective_number").to("meta")
    assert {b.device.type for b in criterion.buffers()} == {"meta"}
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "hinge"}, r"loss = 'hinge' is not allowed \(must be one of"),
        ({"weights": "inverse"}, r"weights = 'inverse' is not allowed \(must be one of"),
        ({"name": "gml", "weights": "effective_number"}, "with loss = 'gml' is not allowed"),
        ({"weights": "effective_number", "beta": 1.0}, "beta = 1.0"),
        ({"weights": "effective_number", "weights_from": 1.1}, "weights_from = 1.1"),
        ({"name": "ldam", "largest_margin": -0.1}, "largest = -0.1"),
        ({"name": "label_aware_smoothing", "smoothing": (0.1, 0.2)}, "head = 0.1, tail = 0.2"),
        ({"name": "balanced_bce", "smoothing": (1.0, 0.0)}, r"smoothing = \(1.0, 0.0\)"),
        ({"smoothing": (-0.1, 0.0)}, r"smoothing = \(-0.1, 0.0\)"),
        ({"name": "focal", "smoothing": (0.1, 0.0)}, "with loss = 'focal' is not allowed"),
    ],
)
def test_criteria_refuse_what_is_unknown_out_of_range_or_idle(arguments, message):
    with pytest.raises(ValueError, match=message):
        Criterion(**{"name": "cross_entropy", "counts": COUNTS, **arguments})
