import math

import pytest
import torch

from ssod_imwa.classification.class_counts import log_prior
from ssod_imwa.classification.losses.gml import GML, gml_loss
from ssod_imwa.config.options import Options

COUNTS = [500, 120, 30, 8, 2]


def test_gml_equals_the_formula_class_by_class(by_hand, batch):
    by_class = {}
    for row, label in by_hand.rows(batch):
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


def test_gml_is_the_mean_over_classes_of_log_recalls(by_hand, logits, labels):
    loss = GML(by_hand.COUNTS, Options())(logits, labels, progress=0.0).item()
    recalls = {0: [], 1: [], 2: []}
    for row, y in zip(logits.tolist(), by_hand.LABELS, strict=True):
        shifted = [x + math.log(p) for x, p in zip(row, by_hand.PRIORS, strict=True)]
        recalls[y].append(math.exp(by_hand.log_softmax(shifted)[y]))
    expected = -sum(math.log(sum(p) / len(p)) for p in recalls.values()) / 3
    assert loss == pytest.approx(expected, rel=1e-6)
