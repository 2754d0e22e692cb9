import math

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.classification.models import CosineClassifier, make_classifier, tau_normalized


def features(count=6, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def linear(width=5, classes=4):
    torch.manual_seed(0)
    return nn.Linear(width, classes)


@pytest.mark.parametrize("scale", [1.0, 16.0, 30.0])
def test_cosine_logits_are_scaled_cosines(scale):
    torch.manual_seed(0)
    classifier = CosineClassifier(5, 4, scale=scale)
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([[1.0], [20.0], [0.1], [3.0]]))
    x, w = features().double().numpy(), classifier.weight.detach().double().numpy()
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    logits = classifier(features())
    assert np.abs(logits.detach().numpy() - scale * (x @ w.T) / norms).max() < 1e-5 * scale
    assert logits.abs().max() <= scale


def test_cosine_weights_begin_with_norm_one():
    torch.manual_seed(0)
    weight = CosineClassifier(64, 100).weight
    assert torch.allclose(weight.norm(dim=1), torch.ones(100))
    # Uniform(-1, 1) has the variance 1/3: entries are about sqrt(3/64) times uniform ones.
    assert weight.abs().max() < 1.5 * math.sqrt(3 / 64)
    assert abs(weight.mean().item()) < 5 / math.sqrt(64 * 6400)


def test_cosine_classifier_has_no_bias_and_its_scale_is_not_trained():
    classifier = CosineClassifier(5, 4)
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]
    assert sum(p.numel() for p in classifier.parameters()) == 20


def test_biased_cosine_logits_are_ncls():
    torch.manual_seed(0)
    classifier = make_classifier("biased_cosine", 5, 4, scale=16.0)
    with torch.no_grad():
        classifier.offset.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
    x, w = features().double().numpy(), classifier.weight.detach().double().numpy()
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    expected = 16 * (x @ w.T) / norms + [0.5, -1, 0, 2]
    assert np.abs(classifier(features()).detach().numpy() - expected).max() < 1e-5


def test_biased_cosine_weights_begin_as_ncls_do():
    torch.manual_seed(0)
    classifier = make_classifier("biased_cosine", 64, 100)
    norms, bound = classifier.weight.norm(dim=1), 1 / 8
    # Uniform in ±1/sqrt(d): squared entries have the mean 1/(3 d).
    assert norms.square().mean().item() == pytest.approx(1 / 3, rel=0.03)
    assert norms.mean().item() == pytest.approx(0.577, abs=0.01)
    assert 0.99 * bound < classifier.weight.abs().max() <= bound
    assert classifier.offset.eq(0).all()
    assert all(p.requires_grad for p in classifier.parameters())
    with torch.no_grad():
        classifier.offset.fill_(3.0)
    classifier.reset_parameters()
    assert classifier.offset.eq(0).all()


def test_no_linear_classifier_loads_a_cosine_one():
    state = make_classifier("biased_cosine", 5, 4).state_dict()
    with pytest.raises(RuntimeError, match="offset"):
        nn.Linear(5, 4).load_state_dict(state)


def test_classifiers_are_made_by_name():
    assert make_classifier("linear", 5, 4).bias is not None
    assert make_classifier("cosine", 5, 4, scale=7.0).scale == 7.0
    with pytest.raises(ValueError, match=r"classifier = 'ncm' is not allowed .*'linear', 'cosine'"):
        make_classifier("ncm", 5, 4)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale = .* is not allowed"):
        CosineClassifier(5, 4, scale=scale)


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.7, 1.0, 2.0])
def test_tau_divides_weights_by_a_power_of_their_norm(tau):
    trained = linear()
    weight = trained.weight.detach().double().numpy()
    result = tau_normalized(trained, tau)
    for c in range(4):
        expected = weight[c] / math.sqrt(sum(value**2 for value in weight[c])) ** tau
        assert np.abs(result.weight[c].detach().numpy() - expected).max() < 1e-6
    assert result.bias is None
    assert torch.allclose(result(features()), features() @ result.weight.T, atol=1e-6)


def test_tau_normalization_changes_neither_the_classifier_nor_the_random_state():
    trained = linear()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    state = torch.get_rng_state()
    result = tau_normalized(trained, 0.0)
    assert result.weight.equal(trained.weight)
    assert result.weight.data_ptr() != trained.weight.data_ptr()
    tau_normalized(trained, 1.0)
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in trained.state_dict().items())


def test_tau_and_weights_are_checked():
    with pytest.raises(ValueError, match=r"tau = -0.1 is not allowed"):
        tau_normalized(linear(), -0.1)
    dead = linear()
    with torch.no_grad():
        dead.weight[2].zero_()
    with pytest.raises(ValueError, match="weights of class 2 are all 0"):
        tau_normalized(dead, 1.0)
