"""Backbones with a pyramid."""

import pytest
import torch
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ssod_imwa.detection.detectors.backbones import build_backbone
from ssod_imwa.detection.detectors.options import BackboneOptions, FPNOptions, ResNetOptions

RESNET = (BackboneOptions(freeze_at=0), ResNetOptions(depth=18, norm="BN"))


def test_a_resnet_with_its_pyramid_is_torchvisions():
    backbone = build_backbone(*RESNET, FPNOptions(out_channels=8)).eval()
    layers = {f"layer{k}": str(k - 1) for k in range(1, 5)}
    torchvisions = BackboneWithFPN(resnet18(), layers, [64, 128, 256, 512], 8).eval()
    torchvisions.load_state_dict(backbone.state_dict())
    images = torch.rand(1, 3, 64, 64)
    expected = torchvisions(images)
    maps = backbone(images)
    assert list(maps) == list(expected)
    assert all(x.equal(expected[name]) for name, x in maps.items())


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (3, 4, 5), (3, 4)])
def test_level_l_has_stride_two_to_the_l(levels):
    backbone = build_backbone(*RESNET, FPNOptions(out_channels=8), levels=levels)
    maps = list(backbone(torch.zeros(1, 3, 128, 64)).values())
    assert [128 // x.shape[-2] for x in maps] == [2**level for level in (*levels, levels[-1] + 1)]
    assert backbone.stride == 2 ** levels[-1]
    assert {x.shape[1] for x in maps} == {backbone.out_channels} == {8}


def test_extra_levels_are_those_of_the_detector():
    extra = LastLevelP6P7(8, 8)
    backbone = build_backbone(
        *RESNET, FPNOptions(out_channels=8), levels=(3, 4, 5), extra_blocks=extra
    )
    assert list(backbone(torch.zeros(1, 3, 128, 128))) == ["0", "1", "2", "p6", "p7"]
