import math

import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.contrastive import (
    balanced_contrastive_loss,
    parametric_contrastive_loss,
)

COUNTS = [300, 40, 5]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(10, 6, generator=generator, dtype=torch.float64), dim=1)
    return features, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.fixture
def prototypes():
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(3, 6, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture
def paco():
    """Arguments of PaCo's loss with five anchors, seven others and three classes."""
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(torch.randn(12, 6, generator=generator, dtype=torch.float64), dim=1)
    return {
        "logits": 2 * torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "labels": torch.tensor([0, 0, 1, 2, 1]),
        "features": features[:5],
        "others": features[5:],
        "other_labels": torch.tensor([0, 1, 1, 0, 0, 0, 1]),
        "log_prior": log_prior(COUNTS),
    }


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def bcl_by_hand(features, labels, prototypes, temperature):
    pool = features.tolist() + prototypes.tolist()
    pool_labels = labels.tolist() + list(range(len(prototypes)))
    losses = []
    for i in range(len(features)):
        others = [j for j in range(len(pool)) if j != i]
        bottom = 0.0
        for label in set(pool_labels):
            of_class = [j for j in others if pool_labels[j] == label]
            exponentials = [math.exp(dot(pool[i], pool[j]) / temperature) for j in of_class]
            bottom += sum(exponentials) / len(of_class)
        positives = [j for j in others if pool_labels[j] == pool_labels[i]]
        logs = [dot(pool[i], pool[p]) / temperature - math.log(bottom) for p in positives]
        losses.append(-sum(logs) / len(positives))
    return sum(losses) / len(losses)


def paco_by_hand(arguments, *, alpha, temperature):
    logits, labels = arguments["logits"].tolist(), arguments["labels"].tolist()
    pool = arguments["features"].tolist() + arguments["others"].tolist()
    pool_labels = labels + arguments["other_labels"].tolist()
    total = 0.0
    for i, label in enumerate(labels):
        scores, weights = [], []
        for c, count in enumerate(COUNTS):
            scores.append(logits[i][c] + math.log(count / sum(COUNTS)))
            weights.append(1.0 if c == label else 0.0)
        for j in range(len(pool)):
            if j != i:
                scores.append(dot(pool[i], pool[j]) / temperature)
                weights.append(alpha if pool_labels[j] == label else 0.0)
        bottom = sum(map(math.exp, scores))
        logs = [w * math.log(math.exp(s) / bottom) for w, s in zip(weights, scores, strict=True)]
        total += -sum(logs) / sum(weights)
    return total / len(labels)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_bcl_equals_the_formula_pair_by_pair(batch, prototypes, temperature):
    result = balanced_contrastive_loss(*batch, prototypes, temperature=temperature)
    assert result.item() == pytest.approx(bcl_by_hand(*batch, prototypes, temperature))


def test_bcl_holds_for_classes_that_the_batch_lacks(batch, prototypes):
    features, labels = batch[0][:4], torch.tensor([0, 0, 0, 2])
    result = balanced_contrastive_loss(features, labels, prototypes, temperature=0.1)
    assert result.item() == pytest.approx(bcl_by_hand(features, labels, prototypes, 0.1))


def test_bcl_does_not_see_how_often_another_class_is_there(batch, prototypes):
    # k copies of prototype 1 leave the average of class 1 as it is, so that the anchor of class 0
    # costs the same for every k, and so does each copy: k + 1 times the loss is linear in k.
    def total(copies):
        features = torch.cat([batch[0][:1], *[prototypes[1:2]] * copies])
        labels = torch.tensor([0] + [1] * copies)
        loss = balanced_contrastive_loss(features, labels, prototypes, temperature=0.1)
        return (copies + 1) * loss.item()

    assert total(5) - total(0) == pytest.approx(5 * (total(1) - total(0)))


def test_bcl_sends_a_gradient_into_the_prototypes(batch, prototypes):
    prototypes.requires_grad_()
    balanced_contrastive_loss(*batch, prototypes, temperature=0.1).backward()
    assert (prototypes.grad.abs().sum(1) > 0).all()


def test_bcl_of_one_class_alone_equals_the_formula(batch, prototypes):
    features, labels = batch[0], torch.zeros(10, dtype=torch.int64)
    result = balanced_contrastive_loss(features, labels, prototypes[:1], temperature=0.1)
    assert result.item() == pytest.approx(bcl_by_hand(features, labels, prototypes[:1], 0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.05, "temperature": 0.2},
        {"alpha": 0.01, "temperature": 0.07},
        {"alpha": 1.0, "temperature": 1.0},
    ],
)
def test_paco_equals_the_formula_score_by_score(paco, settings):
    result = parametric_contrastive_loss(**paco, **settings)
    assert result.item() == pytest.approx(paco_by_hand(paco, **settings), rel=1e-6)


def test_paco_holds_without_others(paco):
    paco = {**paco, "others": paco["others"][:0], "other_labels": paco["other_labels"][:0]}
    result = parametric_contrastive_loss(**paco, alpha=0.05, temperature=0.2)
    expected = paco_by_hand(paco, alpha=0.05, temperature=0.2)
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_paco_of_huge_logits_is_finite(paco):
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 5, requires_grad=True)
    paco = {**paco, "logits": logits}
    loss = parametric_contrastive_loss(**paco, alpha=0.05, temperature=0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def all_losses(features, labels, prototypes):
    logits = features[:, :3]
    return [
        balanced_contrastive_loss(features, labels, prototypes, temperature=0.1),
        parametric_contrastive_loss(
            logits, labels, features, prototypes, torch.arange(3), log_prior(COUNTS),
            alpha=0.05, temperature=0.1,
        ),
    ]  # fmt: skip


def test_contrastive_losses_have_the_numerical_gradient(batch, prototypes):
    features = batch[0].clone().requires_grad_()
    prototypes.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, p: all_losses(f, batch[1], p), (features, prototypes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_lose_only_their_own_rounding(batch, prototypes, dtype):
    features, prototypes = batch[0].to(dtype), prototypes.to(dtype)
    results = all_losses(features, batch[1], prototypes)
    expected = all_losses(features.float(), batch[1], prototypes.float())
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, reference, rtol=0, atol=0)


def test_autocast_does_not_round_similarities(batch, prototypes):
    features, prototypes = batch[0].float(), prototypes.float()
    expected = all_losses(features, batch[1], prototypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = all_losses(features, batch[1], prototypes)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-6, atol=0)


def test_small_temperatures_do_not_overflow(batch, prototypes):
    for loss in all_losses(batch[0].float() * 100, batch[1], prototypes.float() * 100):
        assert torch.isfinite(loss)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_contrastive_losses_refuse_a_temperature(batch, prototypes, temperature):
    with pytest.raises(ValueError, match=r"temperature = .* \(must be above 0\)"):
        balanced_contrastive_loss(*batch, prototypes, temperature=temperature)


def test_paco_refuses_a_negative_weight(paco):
    with pytest.raises(ValueError, match="alpha"):
        parametric_contrastive_loss(**paco, alpha=-0.1, temperature=0.2)


def test_contrastive_losses_refuse_shapes_that_do_not_fit(batch, prototypes):
    with pytest.raises(ValueError, match=r"features of shape \(10, 6\)"):
        balanced_contrastive_loss(batch[0], batch[1][:3], prototypes, temperature=0.1)
    with pytest.raises(ValueError, match="same width"):
        balanced_contrastive_loss(*batch, prototypes[:, :4], temperature=0.1)
