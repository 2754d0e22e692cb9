import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.mixing import (
    Box,
    box_share,
    cut_mix,
    draw_beta,
    draw_box,
    mfw_strengths,
    mix,
    mix_labels,
    remix_label_shares,
)

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
CIFAR100_LT = [int(500 * 100 ** (-c / 99)) for c in range(100)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_beta_draws_have_the_moments_of_the_distribution(alpha):
    draws = draw_beta(alpha, 20_000, generator=seeded()).double()
    variance = 1 / (4 * (2 * alpha + 1))
    error = math.sqrt(variance / 20_000)
    assert draws.mean().item() == pytest.approx(0.5, abs=4 * error)
    assert draws.var().item() == pytest.approx(variance, rel=0.05)
    assert 0 <= draws.min() <= draws.max() <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_beta_draws_of_small_alphas_keep_off_0_and_1(alpha):
    seed = torch.randint(2**63 - 1, (), generator=seeded()).item()
    exact = np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha, 20_000)
    assert exact.astype(np.float32).max() == 1  # what rounding alone would make of some of them
    draws = draw_beta(alpha, 20_000, generator=seeded())
    assert 0 < draws.min() <= draws.max() < 1
    assert np.abs(draws.double().numpy() - exact).max() <= 2**-24


def test_beta_draws_are_a_function_of_the_generator():
    generator = seeded(3)
    first, second = (draw_beta(1.0, 5, generator=generator) for _ in range(2))
    assert torch.equal(first, draw_beta(1.0, 5, generator=seeded(3)))
    assert not torch.equal(first, second)


def test_beta_draws_move_the_generator_on_by_the_same_for_every_count():
    after = []
    for count in (0, 1, 100):
        generator = seeded()
        draw_beta(0.5, count, generator=generator)
        after.append(torch.rand(1, generator=generator).item())
    assert len(set(after)) == 1


def test_beta_draws_leave_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    draw_beta(1.0, 10, generator=seeded())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_beta_draws_of_a_tiny_alpha_are_numbers():
    draws = draw_beta(1e-4, 1000, generator=seeded())
    assert not draws.isnan().any()


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 1), (math.nan, 1), (1.0, -1)])
def test_beta_draws_refuse_numbers_out_of_range(alpha, count):
    with pytest.raises(ValueError, match="is not allowed"):
        draw_beta(alpha, count, generator=seeded())


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 4, 4)])
def test_mix_equals_the_formula_sample_by_sample(shape):
    values = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    permutation = torch.randperm(6, generator=seeded(1))
    shares = torch.rand(6, generator=seeded(2), dtype=torch.float64)
    mixed = mix(values, permutation, shares)
    for n in range(6):
        share = shares[n].item()
        expected = (1 - share) * values[n].numpy() + share * values[permutation[n]].numpy()
        np.testing.assert_allclose(mixed[n].numpy(), expected, rtol=1e-12, atol=1e-15)


def test_one_share_counts_for_the_whole_batch():
    values, permutation = torch.randn(4, 3, generator=seeded()), torch.tensor([1, 2, 3, 0])
    one = mix(values, permutation, torch.tensor([0.3]))
    assert torch.equal(one, mix(values, permutation, torch.full((4,), 0.3)))


def test_a_share_of_0_keeps_the_sample_and_of_1_takes_the_partner_bitwise():
    values, permutation = torch.randn(4, 3, generator=seeded()), torch.tensor([3, 2, 1, 0])
    assert torch.equal(mix(values, permutation, torch.zeros(4)), values)
    assert torch.equal(mix(values, permutation, torch.ones(4)), values.flip(0))


def test_mix_sends_a_gradient_to_sample_and_partner():
    values = torch.randn(3, 2, generator=seeded()).requires_grad_()
    mix(values, torch.tensor([1, 2, 0]), torch.tensor([0.1, 0.2, 0.4]))[0].sum().backward()
    expected = torch.tensor([[0.9, 0.9], [0.1, 0.1], [0.0, 0.0]])
    torch.testing.assert_close(values.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mix_keeps_half_precision(dtype):
    values, shares = torch.randn(4, 3, generator=seeded()).to(dtype), torch.tensor([0.25])
    mixed = mix(values, torch.tensor([3, 2, 1, 0]), shares)
    assert mixed.dtype == dtype
    expected = 0.75 * values.double() + 0.25 * values.double().flip(0)
    torch.testing.assert_close(mixed.double(), expected, rtol=0.01, atol=0.01)


# The boxes are 4 pixels high and 2 wide. Centered on row r of 8, one begins at r - 2, so that 2, 3,
# 4, 4, 4, 4, 4, 3 of its rows lie inside; on column c of 4 at c - 1: 1, 2, 2, 2 columns.
def test_boxes_have_their_center_anywhere_and_end_at_the_image():
    generator = seeded()
    boxes = [draw_box(0.25, 8, 4, generator=generator) for _ in range(3000)]
    heights = {(box.top, box.bottom - box.top) for box in boxes}
    widths = {(box.left, box.right - box.left) for box in boxes}
    assert heights == {(0, 2), (0, 3), (0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (5, 3)}
    assert widths == {(0, 1), (0, 2), (1, 2), (2, 2)}
    mean = sum(box_share(box, 8, 4) for box in boxes) / len(boxes)
    expected = (28 / 8 / 8) * (7 / 4 / 4)
    assert mean == pytest.approx(expected, abs=4 * 0.06 / math.sqrt(3000))


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.0), (1.0, 1.0)])
def test_boxes_of_extreme_shares_stay_in_the_image(share, most):
    generator = seeded()
    for _ in range(200):
        box = draw_box(share, 5, 7, generator=generator)
        assert 0 <= box.top <= box.bottom <= 5
        assert 0 <= box.left <= box.right <= 7
        # A box as large as the image covers at least a quarter of it, whatever its center.
        assert most / 4 - 0.1 <= box_share(box, 5, 7) <= most


def test_boxes_move_the_generator_on_by_two_numbers():
    generator, other = seeded(), seeded()
    draw_box(0.7, 32, 32, generator=generator)
    torch.rand(2, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_cut_mix_takes_the_partners_pixels_inside_the_box_only():
    images = torch.randn(3, 2, 4, 5, generator=seeded())
    before, permutation, box = images.clone(), torch.tensor([1, 2, 0]), Box(1, 3, 2, 5)
    mixed = cut_mix(images, permutation, box)
    taken = 0
    for n in range(3):
        for row in range(4):
            for column in range(5):
                inside = 1 <= row < 3 and 2 <= column < 5
                source = before[permutation[n] if inside else n]
                assert torch.equal(mixed[n, :, row, column], source[:, row, column])
                taken += inside
    assert taken / (3 * 4 * 5) == box_share(box, 4, 5)
    assert torch.equal(images, before)


def test_mixed_labels_give_the_loss_of_mixup():
    logits = torch.randn(6, 4, generator=seeded(), dtype=torch.float64)
    labels, permutation = torch.tensor([0, 1, 2, 3, 0, 0]), torch.tensor([1, 2, 3, 4, 5, 0])
    targets = mix_labels(labels, permutation, torch.tensor([0.25]), classes=4)
    kept, taken = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[permutation])
    result = F.cross_entropy(logits, targets.double())
    torch.testing.assert_close(result, 0.75 * kept + 0.25 * taken)


def test_mixed_labels_sum_to_1():
    labels, shares = torch.tensor([0, 1, 1, 2]), torch.rand(4, generator=seeded())
    targets = mix_labels(labels, torch.tensor([1, 2, 3, 0]), shares, classes=3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets[1].tolist() == [0.0, 1.0, 0.0]  # a partner of the same class


@pytest.mark.parametrize(("kappa", "tau"), [(3.0, 0.5), (3.0, 1.0), (10.0, 0.2), (1.5, 0.0)])
def test_remix_equals_its_three_cases(kappa, tau):
    counts = [300, 100, 99, 10]
    labels = torch.randint(4, (200,), generator=seeded())
    permutation = torch.randperm(200, generator=seeded(1))
    shares = torch.rand(200, generator=seeded(2), dtype=torch.float64)
    result = remix_label_shares(
        shares, labels, permutation, torch.tensor(counts), kappa=kappa, tau=tau
    )
    for n in range(200):
        own, partner = counts[labels[n]], counts[labels[permutation[n]]]
        own_part = 1 - shares[n].item()  # λ_x of the paper
        if own / partner >= kappa and own_part < tau:
            expected = 0.0  # λ_y of the paper
        elif own / partner <= 1 / kappa and 1 - own_part < tau:
            expected = 1.0
        else:
            expected = own_part
        assert result[n].item() == pytest.approx(1 - expected)


def test_remix_gives_one_share_to_each_sample():
    labels, permutation = torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2])
    counts = torch.tensor([100, 1])
    result = remix_label_shares(torch.tensor([0.7]), labels, permutation, counts)
    torch.testing.assert_close(result, torch.tensor([1.0, 0.7, 0.7]))
    result = remix_label_shares(torch.tensor([0.3]), labels, permutation, counts)
    torch.testing.assert_close(result, torch.tensor([0.3, 0.0, 0.3]))


def test_remix_of_equal_counts_is_mixup():
    shares, labels = torch.rand(5, generator=seeded()), torch.tensor([0, 1, 2, 0, 1])
    result = remix_label_shares(
        shares, labels, torch.tensor([1, 2, 3, 4, 0]), torch.tensor([7, 7, 7])
    )
    assert torch.equal(result, shares)


@pytest.mark.parametrize("setting", [{"kappa": 1.0}, {"tau": 1.5}])
def test_remix_refuses_numbers_out_of_range(setting):
    one = torch.tensor([0])
    with pytest.raises(ValueError, match=next(iter(setting))):
        remix_label_shares(torch.tensor([0.5]), one, one, torch.tensor([1]), **setting)


# The specification's table of s, computed there from the formula.
def test_mfw_strengths_of_cifar10_are_those_of_the_paper():
    geometric = mfw_strengths(CIFAR10_LT)
    assert geometric.tolist() == pytest.approx([0.5] * 5 + [0.0] * 5, abs=5e-4)
    arithmetic = mfw_strengths(CIFAR10_LT, deviation="arithmetic")
    expected = [0.406, 0.346, 0.302, 0.273, 0.256, 0.245, 0.239, 0.235, 0.233, 0.232]
    assert arithmetic.tolist() == pytest.approx(expected, abs=6e-4)


def test_mfw_strengths_of_cifar100_are_those_of_the_specification():
    strengths = mfw_strengths(CIFAR100_LT)[[0, 24, 49, 74, 99]]  # its quantiles, head first
    assert strengths.tolist() == pytest.approx([0.5, 0.5, 0.282, 0.006, 0.002], abs=6e-4)


@pytest.mark.parametrize("deviation", ["geometric", "arithmetic"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_mfw_strengths_equal_the_formula(deviation, beta):
    counts = np.array([40.0, 22.0, 15.0, 9.0])
    mean = math.prod(counts) ** (1 / 4)
    if deviation == "geometric":
        spread = math.exp(math.sqrt(sum(math.log(n / mean) ** 2 for n in counts) / 4))
    else:
        spread = math.sqrt(sum((n - counts.mean()) ** 2 for n in counts) / 4)
    expected = [0.5 / (1 + math.exp(-(n - mean) / (beta * spread))) for n in counts]
    result = mfw_strengths(counts, beta=beta, deviation=deviation)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("deviation", ["geometric", "arithmetic"])
def test_mfw_strengths_of_step_data_are_half_and_nothing(deviation):
    strengths = mfw_strengths([5000] * 5 + [50] * 5, beta=0.01, deviation=deviation)
    assert strengths.tolist() == pytest.approx([0.5] * 5 + [0.0] * 5, abs=1e-6)


@pytest.mark.parametrize("deviation", ["geometric", "arithmetic"])
@pytest.mark.parametrize("counts", [[7], [5000] * 10, [3, 3, 3]])
def test_mfw_strengths_of_equal_counts_are_a_quarter(counts, deviation):
    assert mfw_strengths(counts, deviation=deviation).tolist() == [0.25] * len(counts)


def test_mfw_refuses_numbers_out_of_range():
    with pytest.raises(ValueError, match="beta = 0"):
        mfw_strengths([2, 1], beta=0)
    with pytest.raises(ValueError, match=r"'mean' is not allowed .*geometric"):
        mfw_strengths([2, 1], deviation="mean")


def test_mixing_refuses_shapes_and_types_that_do_not_fit():
    values, permutation = torch.zeros(3, 2), torch.tensor([1, 2, 0])
    with pytest.raises(ValueError, match=r"permutation of shape \(3,\) does not fit a batch of 2"):
        mix(values[:2], permutation, torch.zeros(1))
    with pytest.raises(ValueError, match=r"shares of shape \(2,\) do not fit a batch of 3"):
        mix(values, permutation, torch.zeros(2))
    with pytest.raises(ValueError, match=r"torch.uint8 are not allowed"):
        mix(values.byte(), permutation, torch.zeros(1))


def test_an_empty_batch_stays_empty():
    none = torch.zeros(0, dtype=torch.int64)
    assert mix(torch.zeros(0, 3), none, torch.zeros(0)).shape == (0, 3)
    assert mix_labels(none, none, torch.zeros(0), classes=3).shape == (0, 3)
