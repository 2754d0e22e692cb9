import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score

from ssod_imwa.classification.gradients import (
    Reaction,
    by_class,
    gradient_norms,
    measure_reaction,
)
from ssod_imwa.classification.models.classifiers import CosineClassifier


def test_of_a_linear_classifier_it_is_the_closed_form(toy):
    net = toy.net()
    images, labels = toy.images_and_labels()
    found = measure_reaction(net, toy.batches(images, labels))
    with torch.no_grad():
        features = net.features(images).double()
        weight, bias = net.classifier.weight.double(), net.classifier.bias.double()
        errors = torch.softmax(features @ weight.T + bias, 1) - F.one_hot(labels, 3)
        expected = (errors @ weight).norm(dim=1)  # ‖Wᵀ(p − y)‖
    np.testing.assert_allclose(found.norms, expected, rtol=1e-4)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == labels.tolist()


def test_of_any_head_it_is_the_difference_quotient():
    torch.manual_seed(0)
    head = CosineClassifier(4, 3, scale=5.0).double()
    features, labels = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = gradient_norms(head, features, labels)
    step = 1e-6
    for i in range(3):
        slopes = []
        for j in range(4):
            sides = []
            for sign in (1, -1):
                moved = features[i : i + 1].clone()
                moved[0, j] += sign * step
                sides.append(float(F.cross_entropy(head(moved), labels[i : i + 1]).detach()))
            slopes.append((sides[0] - sides[1]) / (2 * step))
        assert float(found[i]) == pytest.approx(np.linalg.norm(slopes), rel=1e-4)


@pytest.mark.parametrize("group", ["stem", "layer1"])
def test_at_a_group_it_is_what_autograd_finds_for_each_image_alone(toy, group):
    net = toy.net()
    images, labels = toy.images_and_labels()
    found = measure_reaction(net, toy.batches(images, labels), group=group)
    kept = {}
    layers = net.get_submodule(group)
    handle = layers.register_forward_hook(lambda m, i, out: kept.update(out=out))
    for i in range(len(images)):
        loss = F.cross_entropy(net(images[i : i + 1]), labels[i : i + 1])
        (gradient,) = torch.autograd.grad(loss, kept["out"])
        assert found.norms[i] == pytest.approx(float(gradient.norm()), rel=1e-3)
    handle.remove()
    plain = measure_reaction(net, toy.batches(images, labels))
    np.testing.assert_allclose(found.features, plain.features, rtol=1e-4, atol=1e-5)
    assert found.predictions.tolist() == plain.predictions.tolist()


def test_an_unknown_group_is_refused(toy):
    batches = toy.batches(*toy.images_and_labels())
    with pytest.raises(ValueError, match=r"group = 'x' .* one of \['stem', 'layer1'\]"):
        measure_reaction(toy.net(), batches, group="x")
    with pytest.raises(ValueError, match="not allowed with experts"):
        measure_reaction(toy.experts(), batches, group="stem")


def test_of_experts_it_is_the_mean_of_their_own(toy):
    model = toy.experts()
    images, labels = toy.images_and_labels()
    found = measure_reaction(model, toy.batches(images, labels))
    own = [measure_reaction(expert, toy.batches(images, labels)) for expert in model.experts]
    np.testing.assert_allclose(found.norms, (own[0].norms + own[1].norms) / 2, rtol=1e-5)
    with torch.no_grad():
        assert found.predictions.tolist() == model(images).argmax(1).tolist()
    assert found.features.shape == (10, 10)


def test_nothing_of_the_network_changes(toy):
    net = toy.net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    measure_reaction(net, toy.batches(*toy.images_and_labels()), group="stem")
    assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_numbers_of_classes_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(3, size=30), generator.integers(3, size=30)
    norms = generator.random(30)
    found = by_class(Reaction(norms, predictions, labels, np.zeros((30, 0))), classes=4)
    recall = recall_score(labels, predictions, labels=[0, 1, 2], average=None)
    np.testing.assert_allclose(found.accuracy[:3], recall)
    for c in range(3):
        own = [float(x) for x, label in zip(norms, labels, strict=True) if label == c]
        assert found.gradient_norm[c] == pytest.approx(sum(own) / len(own))
        called = sum(1 for prediction in predictions if prediction == c)
        assert found.ratio[c] == pytest.approx(called / len(own))
    assert np.isnan(found.accuracy[3])
    assert np.isnan(found.ratio[3])
