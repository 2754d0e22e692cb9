"""The last stages of a network behind its first ones are the network."""

import pytest
import timm
import torch

from ssod_imwa.classification.models.build import Settings, build_classifier
from ssod_imwa.classification.models.feature_tail import (
    FeatureTail,
    FeatureTailOptions,
    check_stages,
    first_stages,
)
from ssod_imwa.errors import WeightsError


@pytest.mark.parametrize("network", ["tf_efficientnet_lite0", "mobilenetv2_050"])
@pytest.mark.parametrize("stages", [1, 5, 6])
@torch.no_grad()
def test_first_and_last_stages_are_the_network(network, stages):
    torch.manual_seed(0)
    whole = timm.create_model(network, num_classes=0).double().eval()
    tail = FeatureTail(4, FeatureTailOptions(network, stages)).double().eval()
    tail.load_library_weights(whole.state_dict(), "x")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = first_stages(whole, stages)(images)
    torch.testing.assert_close(tail.features(maps), whole(images), rtol=1e-12, atol=1e-14)
    assert len(tail.groups) == 7 - stages + 1
    assert tail.num_features == whole.num_features


def test_weights_of_another_network_are_refused():
    tail = FeatureTail(4)
    other = timm.create_model("tf_efficientnet_lite1", num_classes=0).state_dict()
    with pytest.raises(WeightsError, match="x is of another network than CLS"):
        tail.load_library_weights({k: v for k, v in other.items() if "blocks.6" not in k}, "x")
    other["blocks.6.0.conv_pw.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"x is of another network: .*size mismatch"):
        tail.load_library_weights(other, "x")


@pytest.mark.parametrize(
    ("network", "stages", "message"),
    [
        ("tf_efficientnet_lite0", 7, "7 stages of tf_efficientnet_lite0 are not .*must be 1..6"),
        ("resnet10t", 1, "resnet10t is not allowed .must be an EfficientNet"),
        ("resnet0", 1, "network = 'resnet0' is not allowed"),
    ],
)
def test_networks_without_such_stages_are_refused(network, stages, message):
    with pytest.raises(ValueError, match=message):
        FeatureTail(4, FeatureTailOptions(network, stages))


def test_no_stage_is_not_a_first_part():
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    with pytest.raises(ValueError, match="0 stages of x are not allowed"):
        check_stages(network, 0, "x")


def test_it_is_built_by_name_and_its_cut_is_refused_for_other_networks():
    options = FeatureTailOptions(cached_stages=6)
    tail = build_classifier("feature_tail", Settings(3, 32, feature_tail=options))
    assert tail.group_names == ("stages.6", "top")
    with pytest.raises(ValueError, match=r"cached_stages=6\) is not allowed with"):
        build_classifier("resnet12", Settings(3, 32, feature_tail=options))
