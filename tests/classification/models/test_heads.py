import pytest
import torch
from torch import nn

from ssod_imwa.classification.models.classifiers import CosineClassifier
from ssod_imwa.classification.models.heads import ScaledClassifier, projection_head


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("bcl", [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]),
        ("paco", [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]),
        ("gpaco", [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]),
        ("moco", [nn.Linear, nn.ReLU, nn.Linear]),
    ],
)
def test_heads_have_the_layers_of_their_papers(kind, layers):
    head = projection_head(kind, 6, 8, 3)
    assert [type(layer) for layer in head] == layers
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    widths = [linear[0].in_features] + [layer.out_features for layer in linear]
    assert widths == [6] + [8] * (len(linear) - 1) + [3]
    assert all(layer.bias is not None for layer in linear)
    assert head(torch.randn(4, 6)).shape == (4, 3)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"head = 'simclr' is not allowed .*'bcl', 'paco'"):
        projection_head("simclr", 6, 8, 3)


def test_scales_begin_at_one_and_multiply_the_bias_too():
    torch.manual_seed(0)
    linear = nn.Linear(5, 3).double()
    scaled = ScaledClassifier(linear)
    features = torch.randn(4, 5, dtype=torch.float64)
    assert scaled(features).equal(linear(features))
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([2.0, 0.5, -1.0]))
    logits, weight, bias = scaled(features).tolist(), linear.weight.tolist(), linear.bias.tolist()
    x = features.tolist()
    for i in range(4):
        for c, scale in enumerate([2.0, 0.5, -1.0]):
            dot = sum(x[i][j] * weight[c][j] for j in range(5))
            assert logits[i][c] == pytest.approx(scale * (dot + bias[c]))


@pytest.mark.parametrize("bias", [True, False])
def test_folded_classifier_has_the_same_logits(bias):
    torch.manual_seed(0)
    scaled = ScaledClassifier(nn.Linear(5, 3, bias=bias).double())
    nn.init.uniform_(scaled.scale, 0.1, 3)
    features = torch.randn(4, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    folded = scaled.folded()
    assert torch.get_rng_state().equal(state)
    assert (folded.bias is not None) is bias
    assert torch.allclose(folded(features), scaled(features), rtol=1e-12)
    nn.init.zeros_(folded.weight)
    assert scaled.classifier.weight.any()  # not shared


def test_a_scaled_cosine_classifier_works_but_is_not_linear():
    scaled = ScaledClassifier(CosineClassifier(5, 3, scale=16.0))
    assert scaled.scale.shape == (3,)
    assert scaled(torch.randn(4, 5)).abs().max() <= 16
    with pytest.raises(ValueError, match="scaled CosineClassifier is no linear classifier"):
        scaled.folded()


def test_reset_concerns_the_scales_alone():
    scaled = ScaledClassifier(nn.Linear(5, 3))
    weight = scaled.classifier.weight.clone()
    nn.init.zeros_(scaled.scale)
    scaled.reset_parameters()
    assert scaled.scale.tolist() == [1, 1, 1]
    assert scaled.classifier.weight.equal(weight)
