import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.losses.collaborative import (
    bkt_weights,
    hard_category_mask,
    info_nce_loss,
    knowledge_distillation_loss,
    masked_logits,
    nested_distillation_loss,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=1)


def softmax(row):
    top = max(row)
    exponentials = [math.exp(x - top) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pairs_by_hand(logits, temperature):
    """KL(p^k || p^q) of image i, by (k, q, i)."""
    p = [[softmax([x / temperature for x in row]) for row in expert] for expert in logits.tolist()]
    experts, images = range(len(p)), range(len(p[0]))
    return {(k, q, i): kl(p[k][i], p[q][i]) for k in experts for q in experts for i in images}


def info_nce_by_hand(queries, keys, queue, temperature):
    total = 0.0
    for query, key in zip(queries.tolist(), keys.tolist(), strict=True):
        scores = [
            sum(a * b for a, b in zip(query, other, strict=True)) / temperature
            for other in [key, *queue.tolist()]
        ]
        total -= math.log(math.exp(scores[0]) / sum(math.exp(s) for s in scores))
    return total / len(queries)


def standardized_loss_by_hand(row, label):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return -math.log(softmax([x / deviation for x in row])[label])


# ------------------------------------------------------------------------------------- contrastive


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("length", [1, 7])
def test_info_nce_equals_the_formula_score_by_score(temperature, length):
    queries, keys, queue = unit(5, 6), unit(5, 6, seed=1), unit(length, 6, seed=2)
    result = info_nce_loss(queries, keys, queue, temperature=temperature)
    assert result.item() == pytest.approx(info_nce_by_hand(queries, keys, queue, temperature))


def test_info_nce_does_not_use_the_other_keys_of_the_batch():
    queries, keys, queue = unit(4, 6), unit(4, 6, seed=1), unit(9, 6, seed=2)
    together = info_nce_loss(queries, keys, queue, temperature=0.2)
    alone = [
        info_nce_loss(queries[i : i + 1], keys[i : i + 1], queue, temperature=0.2) for i in range(4)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_info_nce_of_an_empty_queue_is_zero():
    queries = unit(3, 4)
    loss = info_nce_loss(queries, unit(3, 4, seed=1), queries[:0], temperature=0.2)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_info_nce_of_no_queries_is_zero_with_a_gradient():
    queries = torch.zeros(0, 4, requires_grad=True)
    loss = info_nce_loss(queries, torch.zeros(0, 4), torch.eye(4), temperature=0.2)
    loss.backward()
    assert loss.item() == 0
    assert queries.grad.shape == (0, 4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_info_nce_refuses_a_temperature(temperature):
    with pytest.raises(ValueError, match=r"temperature = .* is not allowed"):
        info_nce_loss(unit(2, 3), unit(2, 3), unit(4, 3), temperature=temperature)


@pytest.mark.parametrize(("keys", "queue"), [((3, 3), (4, 3)), ((2, 4), (4, 3)), ((2, 3), (4, 2))])
def test_info_nce_refuses_rows_that_do_not_fit(keys, queue):
    with pytest.raises(ValueError, match="do not fit"):
        info_nce_loss(unit(2, 3), unit(*keys), unit(*queue), temperature=0.2)


# ------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_equals_the_formula_pair_by_pair(experts, temperature):
    logits = 3 * randn(experts, 4, 6)
    weights = randn(experts, 4, seed=1).exp()
    by_pair = pairs_by_hand(logits, temperature)
    count = 4 * experts * (experts - 1)
    plain = sum(temperature**2 * value for value in by_pair.values()) / count
    weighted = sum(
        weights[k, i].item() * temperature**2 * value for (k, _, i), value in by_pair.items()
    )
    result = knowledge_distillation_loss(logits, temperature=temperature)
    assert result.item() == pytest.approx(plain)
    result = knowledge_distillation_loss(logits, temperature=temperature, weights=weights)
    assert result.item() == pytest.approx(weighted / count)


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_nested_distillation_is_divided_by_the_partners_alone(experts):
    logits = 2 * randn(experts, 5, 7)
    expected = sum(pairs_by_hand(logits, 1.0).values()) / ((experts - 1) * 5)
    assert nested_distillation_loss(logits).item() == pytest.approx(expected)


def test_distillation_agrees_with_torchs_divergence():
    logits = randn(3, 4, 6)
    log_p = logits.log_softmax(2)
    total = sum(
        F.kl_div(log_p[q], log_p[k], log_target=True, reduction="batchmean")
        for k in range(3)
        for q in range(3)
        if q != k
    )
    torch.testing.assert_close(knowledge_distillation_loss(logits), total / 6)


@pytest.mark.parametrize("experts", [2, 3, 4, 5])
def test_identical_experts_have_nothing_to_distil(experts):
    logits = (5 * randn(1, 6, 9)).repeat(experts, 1, 1).requires_grad_()
    loss = knowledge_distillation_loss(logits, weights=randn(experts, 6, seed=1).exp())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert nested_distillation_loss(logits).item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", [knowledge_distillation_loss, nested_distillation_loss])
def test_distillation_sends_gradients_to_both_sides(loss):
    logits = randn(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,))
    # KL(p ‖ q) alone, with q's gradient stopped, must have another gradient for p.
    (whole,) = torch.autograd.grad(loss(logits), logits)
    other = torch.stack([logits[0], logits[1].detach()])
    (alone,) = torch.autograd.grad(loss(other), logits)
    assert alone[1].abs().sum() == 0
    assert (whole[1].abs().sum(1) > 0).all()
    torch.testing.assert_close(whole[0], alone[0])


def test_the_weight_of_an_expert_scales_its_own_rows_alone():
    logits = randn(3, 4, 6)
    weights = torch.zeros(3, 4, dtype=torch.float64)
    weights[1, 2] = 5.0
    by_pair = pairs_by_hand(logits, 1.0)
    expected = 5 * (by_pair[1, 0, 2] + by_pair[1, 2, 2]) / (4 * 6)
    assert knowledge_distillation_loss(logits, weights=weights).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [knowledge_distillation_loss, nested_distillation_loss])
def test_distillation_of_no_images_is_zero(loss):
    logits = torch.zeros(3, 0, 5, requires_grad=True)
    result = loss(logits)
    result.backward()
    assert result.item() == 0


@pytest.mark.parametrize("loss", [knowledge_distillation_loss, nested_distillation_loss])
def test_one_expert_has_nothing_to_distil(loss):
    logits = randn(1, 4, 6).requires_grad_()
    result = loss(logits)
    result.backward()
    assert result.item() == 0
    assert logits.grad.eq(0).all()


def test_distillation_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="temperature = 0 is not allowed"):
        knowledge_distillation_loss(torch.zeros(2, 2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"\(2, 3\) are not allowed"):
        knowledge_distillation_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weights of shape"):
        knowledge_distillation_loss(torch.zeros(2, 4, 3), weights=torch.ones(4))


def test_distillation_of_huge_logits_is_finite():
    logits = torch.tensor([[[1e4, 0.0, -1e4]], [[-1e4, 0.0, 1e4]]], requires_grad=True)
    loss = knowledge_distillation_loss(logits)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(logits.grad).all()


# ----------------------------------------------------------------------- balanced transfer (BKT)


@pytest.mark.parametrize("form", ["cls_over_ref", "ref_over_cls"])
def test_bkt_weights_equal_the_formula_image_by_image(form):
    cls, ref, labels = 3 * randn(2, 4, 5), randn(2, 4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    result = bkt_weights(cls, ref, labels, form=form)
    for k in range(2):
        for i, label in enumerate(labels.tolist()):
            own = standardized_loss_by_hand(cls[k, i].tolist(), label)
            reference = standardized_loss_by_hand(ref[k, i].tolist(), label)
            expected = own / reference if form == "cls_over_ref" else reference / own
            assert result[k, i].item() == pytest.approx(expected)


def test_bkt_weights_of_equal_heads_are_one():
    logits = 4 * randn(3, 6, 8, dtype=torch.float32)
    assert torch.equal(bkt_weights(logits, logits, torch.arange(6)), torch.ones(3, 6))


def test_bkt_weights_do_not_see_scale_or_shift():
    cls, ref, labels = randn(2, 4, 5), randn(2, 4, 5, seed=1), torch.tensor([0, 4, 2, 2])
    expected = bkt_weights(cls, ref, labels)
    torch.testing.assert_close(bkt_weights(7 * cls - 3, 0.2 * ref + 5, labels), expected)


def test_bkt_weights_are_large_where_the_cls_head_is_less_sure():
    sure, unsure = torch.tensor([[[5.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 5.0, 0.0]]])
    label = torch.tensor([0])
    assert bkt_weights(unsure, sure, label).item() > 1
    assert bkt_weights(sure, unsure, label).item() < 1
    assert bkt_weights(unsure, sure, label, form="ref_over_cls").item() < 1


def test_bkt_weights_have_no_gradient():
    cls, ref = (randn(2, 3, 4, seed=s).requires_grad_() for s in (0, 1))
    weights = bkt_weights(cls, ref, torch.tensor([0, 1, 2]))
    assert not weights.requires_grad
    knowledge_distillation_loss(cls, weights=weights).backward()
    constant = cls.detach().requires_grad_()
    knowledge_distillation_loss(constant, weights=weights.clone()).backward()
    assert torch.equal(cls.grad, constant.grad)
    assert ref.grad is None


def test_bkt_weights_are_clipped_and_their_losses_floored():
    # 999 equal wrong classes: σ is small against the lead, and the loss of a sure head is tiny.
    sure = torch.zeros(1, 1, 1000, dtype=torch.float64)
    sure[..., 0] = 1
    unsure, label = sure.flip(2), torch.tensor([0])
    sure_loss, unsure_loss = (
        standardized_loss_by_hand(x[0, 0].tolist(), 0) for x in (sure, unsure)
    )
    assert sure_loss < 1e-6
    weight = bkt_weights(unsure, sure, label).item()
    assert weight == pytest.approx(unsure_loss / 1e-6)
    assert bkt_weights(unsure, sure, label, floor=1e-3).item() == pytest.approx(unsure_loss / 1e-3)
    assert bkt_weights(unsure, sure, label, clip=4.0).item() == 4
    assert bkt_weights(sure, unsure, label, clip=4.0).item() == pytest.approx(1 / weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bkt_weights_of_logits_without_spread_are_those_of_a_uniform_head(dtype):
    flat = torch.full((1, 1, 3), 0.1, dtype=dtype)
    ref = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=dtype)
    expected = math.log(3) / standardized_loss_by_hand([1.0, 0.0, 0.0], 0)
    result = bkt_weights(flat, ref, torch.tensor([0])).item()
    assert result == pytest.approx(expected, rel=1e-6)


def test_bkt_weights_of_no_images_are_empty():
    empty = torch.zeros(3, 0, 5)
    assert bkt_weights(empty, empty, torch.zeros(0, dtype=torch.int64)).shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "ratio"}, "form = 'ratio' is not allowed"),
        ({"clip": 0.0}, "clip = 0.0 is not allowed"),
        ({"floor": -1.0}, "floor = -1.0 is not allowed"),
    ],
)
def test_bkt_weights_refuse_options(options, message):
    logits = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=message):
        bkt_weights(logits, logits, torch.tensor([0]), **options)


def test_bkt_weights_refuse_shapes_that_do_not_fit():
    logits, labels = torch.zeros(2, 4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="ref_logits of shape"):
        bkt_weights(logits, logits[:1], labels)
    with pytest.raises(ValueError, match="do not fit labels"):
        bkt_weights(logits, logits, labels[:2])


# --------------------------------------------------------------------------------- hard categories


def mask_by_hand(raw, labels, count):
    rows = []
    for row, label in zip(raw.tolist(), labels.tolist(), strict=True):
        others = sorted((c for c in range(len(row)) if c != label), key=lambda c: -row[c])
        chosen = {label, *others[: count - 1]}
        rows.append([c in chosen for c in range(len(row))])
    return torch.tensor(rows)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_hard_categories_are_the_true_class_and_the_strongest_others(count):
    raw, labels = randn(6, 7), torch.tensor([0, 1, 2, 3, 6, 6])
    mask = hard_category_mask(raw, labels, count=count)
    assert torch.equal(mask, mask_by_hand(raw, labels, count))
    assert mask.sum(1).tolist() == [count] * 6


@pytest.mark.parametrize("label", [0, 2])
def test_the_true_class_is_one_of_the_count_wherever_it_ranks(label):
    mask = hard_category_mask(torch.tensor([[9.0, 5.0, -9.0]]), torch.tensor([label]), count=2)
    assert mask.tolist() == [[True, label == 0, label == 2]]


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_hard_categories_refuse_a_count(count):
    with pytest.raises(ValueError, match=rf"count = {count} is not allowed \(must be 1..C = 3\)"):
        hard_category_mask(torch.zeros(1, 3), torch.tensor([0]), count=count)


def test_hard_categories_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="raw_logits of shape"):
        hard_category_mask(torch.zeros(2, 3), torch.tensor([0]), count=1)


def test_hard_categories_of_no_images_are_empty():
    mask = hard_category_mask(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), count=2)
    assert mask.shape == (0, 3)


def test_masked_logits_are_zero_outside_and_keep_gradients_inside():
    logits = randn(2, 3, 4).requires_grad_()
    mask = hard_category_mask(logits[0], torch.tensor([0, 1, 2]), count=2)
    hidden = masked_logits(logits, mask)
    for k in range(2):
        for i in range(3):
            for c in range(4):
                expected = logits[k, i, c].item() if mask[i, c] else 0.0
                assert hidden[k, i, c].item() == expected
    hidden.sum().backward()
    assert torch.equal(logits.grad, mask.double().expand(2, -1, -1))
    with pytest.raises(ValueError, match="mask of shape"):
        masked_logits(logits, mask[:2])


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_losses_widen_half_precision_and_keep_double(dtype):
    logits, other = (3 * randn(2, 4, 5, seed=s).to(dtype) for s in (0, 1))
    rows, keys, queue = (unit(4, 5, seed=s).to(dtype) for s in (0, 1, 2))
    labels = torch.arange(4)
    wide = torch.promote_types(dtype, torch.float32)

    def values(convert):
        a, b, c = convert(rows), convert(keys), convert(queue)
        return [
            info_nce_loss(a, b, c, temperature=0.2),
            knowledge_distillation_loss(convert(logits)),
            nested_distillation_loss(convert(logits)),
            bkt_weights(convert(logits), convert(other), labels),
        ]

    for result, expected in zip(values(lambda x: x), values(lambda x: x.to(wide)), strict=True):
        assert result.dtype == wide
        assert torch.equal(result, expected)
    narrow = hard_category_mask(logits[0], labels, count=2)
    assert torch.equal(narrow, hard_category_mask(logits[0].to(wide), labels, count=2))


def test_info_nce_stays_exact_under_autocast():
    rows, keys, queue = (unit(4, 5, seed=s).float() for s in (0, 1, 2))
    expected = info_nce_loss(rows, keys, queue, temperature=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = info_nce_loss(rows, keys, queue, temperature=0.2)
    assert torch.equal(result, expected)
