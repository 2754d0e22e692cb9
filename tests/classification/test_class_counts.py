import math

import numpy as np
import pytest
import torch

from ssod_imwa.classification.class_counts import (
    checked_counts,
    deferred_weights,
    effective_number_weights,
    ldam_margins,
    log_odds,
    log_prior,
    prior,
    smoothing_by_class,
)

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_counts_are_taken_as_list_array_and_tensor():
    for counts in ([3, 1], np.array([3, 1]), torch.tensor([3, 1], dtype=torch.int32)):
        assert checked_counts(counts).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("counts", [[5, 0], [5, -1], [5.0, math.nan], [5.0, math.inf]])
def test_counts_below_1_are_refused_with_their_class(counts):
    with pytest.raises(ValueError, match=r"counts\[1\] = .* is not allowed \(must be at least 1"):
        checked_counts(counts)


@pytest.mark.parametrize("counts", [[], [[1, 2]], 3])
def test_counts_that_are_no_row_are_refused(counts):
    with pytest.raises(ValueError, match="one number a class"):
        checked_counts(counts)


def test_log_prior_and_log_odds_equal_the_logarithms_of_fractions():
    total = sum(CIFAR10_LT)
    rows = (prior(CIFAR10_LT), log_prior(CIFAR10_LT), log_odds(CIFAR10_LT))
    for share, log_share, odds, count in zip(
        *map(torch.Tensor.tolist, rows), CIFAR10_LT, strict=True
    ):
        assert share == pytest.approx(count / total, rel=1e-6)
        assert log_share == pytest.approx(math.log(count / total), rel=1e-6)
        assert odds == pytest.approx(math.log(count / total / (1 - count / total)), rel=1e-6)


def test_log_odds_of_one_class_are_refused():
    assert log_prior([7]).tolist() == [0.0]
    with pytest.raises(ValueError, match="1 class is not allowed"):
        log_odds([7])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 0.999999])
def test_effective_number_weights_equal_the_geometric_series(beta):
    # 1 / w is the sum of β^k for k < n, here added up term by term.
    numbers = [math.fsum(beta**k for k in range(count)) for count in CIFAR10_LT]
    scale = len(numbers) / math.fsum(1 / number for number in numbers)
    expected = [scale / number for number in numbers]
    weights = effective_number_weights(CIFAR10_LT, beta=beta)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    assert weights.sum().item() == pytest.approx(len(CIFAR10_LT))


def test_effective_number_weights_approach_inverse_counts():
    weights = effective_number_weights([1000, 10], beta=1 - 1e-12)
    assert weights.tolist() == pytest.approx([2 * 10 / 1010, 2 * 1000 / 1010], rel=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_effective_number_weights_refuse_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        effective_number_weights([1, 2], beta=beta)


def test_deferred_weights_switch_at_epoch_160_of_200():
    weights = effective_number_weights(CIFAR10_LT)
    for epoch in range(200):
        expected = weights if epoch >= 160 else torch.ones(10)
        assert torch.equal(deferred_weights(weights, progress=epoch / 200), expected)


def test_deferred_weights_can_start_at_once_or_at_the_end():
    weights = torch.tensor([0.5, 1.5])
    assert torch.equal(deferred_weights(weights, progress=0.0, start=0.0), weights)
    assert torch.equal(deferred_weights(weights, progress=0.99, start=1.0), torch.ones(2))


@pytest.mark.parametrize("arguments", [{"progress": 1.1}, {"progress": 0.5, "start": -0.1}])
def test_deferred_weights_refuse_progress_out_of_range(arguments):
    with pytest.raises(ValueError, match="between 0 and 1"):
        deferred_weights(torch.ones(2), **arguments)


def test_ldam_margins_equal_the_formula():
    roots = [1 / math.sqrt(math.sqrt(count)) for count in CIFAR10_LT]
    expected = [0.5 * root / max(roots) for root in roots]
    assert ldam_margins(CIFAR10_LT).tolist() == pytest.approx(expected, rel=1e-6)
    assert ldam_margins([7]).tolist() == [0.5]


def test_ldam_margins_refuse_a_negative_one():
    with pytest.raises(ValueError, match="largest = -1"):
        ldam_margins([1, 2], largest=-1)


def test_smoothing_equals_the_formula_between_its_bounds():
    smoothing = smoothing_by_class(CIFAR10_LT, head=0.4, tail=0.1)
    expected = [0.1 + 0.3 * math.sin(math.pi / 2 * (count - 50) / 4950) for count in CIFAR10_LT]
    assert smoothing.tolist() == pytest.approx(expected, abs=1e-7)
    assert smoothing[0].item() == pytest.approx(0.4)
    assert smoothing[-1].item() == pytest.approx(0.1)


@pytest.mark.parametrize("counts", [[9, 9, 9], [4]])
def test_smoothing_of_equal_counts_is_that_of_the_head(counts):
    smoothing = smoothing_by_class(counts, head=0.3, tail=0.0)
    assert smoothing.tolist() == pytest.approx([0.3] * len(counts))


@pytest.mark.parametrize(("head", "tail"), [(0.1, 0.2), (1.0, 0.0), (0.5, -0.1)])
def test_smoothing_out_of_range_is_refused(head, tail):
    with pytest.raises(ValueError, match="0 <= tail <= head < 1"):
        smoothing_by_class([2, 1], head=head, tail=tail)
