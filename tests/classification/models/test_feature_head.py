import pytest
import torch

from ssod_imwa.classification.models.build import Settings, build_classifier
from ssod_imwa.classification.models.feature_head import FeatureHeadOptions


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_head_is_one_matrix_or_two(hidden):
    options = FeatureHeadOptions(width=4, hidden=hidden)
    model = build_classifier("feature_head", Settings(2, 32, feature_head=options))
    x = torch.randn(5, 4)
    rows = x
    if hidden:
        layer = model.hidden[0]
        rows = (x @ layer.weight.T + layer.bias).clamp(min=0)
    expected = rows @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(x), expected)
    assert model.num_features == (hidden or 4)
    assert len(model.groups) == 1


def test_its_layers_are_refused_for_other_networks():
    options = FeatureHeadOptions(hidden=3)
    with pytest.raises(ValueError, match=r"hidden=3\) is not allowed with model = 'resnet12'"):
        build_classifier("resnet12", Settings(2, 32, feature_head=options))
