"""timm's networks as bodies: levels, frozen stages, folded norms."""

import copy

import pytest
import timm
import torch
from torch import nn

from ssod_imwa.detection.detectors.backbones import build_backbone
from ssod_imwa.detection.detectors.options import BackboneOptions, FPNOptions, ResNetOptions
from ssod_imwa.detection.detectors.timm_bodies import FoldedConv2d, FrozenNorm, make_timm_body

LITE = "tf_efficientnet_lite0"
# Of each: how many norms there are below level 4, and how many are folded. DenseNet and ResNetV2
# have norms before convolutions, RepVGG some beside them; ConvNeXt has no batch norm.
FAMILIES = {
    LITE: (33, 33),
    "resnet18": (15, 15),
    "regnety_002": (22, 22),
    "densenet121": (87, 43),
    "resnetv2_50": (39, 26),
    "repvgg_a0": (59, 42),
    "convnext_atto": (0, 0),
}


def random_norms(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low, high in (
                    (part.running_mean, -0.1, 0.1),
                    (part.bias, -0.1, 0.1),
                    (part.running_var, 0.5, 2),
                    (part.weight, 0.5, 1.5),
                ):
                    tensor.uniform_(low, high, generator=generator)


def without_counters(state):
    return {k: x for k, x in state.items() if not k.endswith("num_batches_tracked")}


def body_like_timms(name, **settings):
    """A body up to level 4 and timm's own network with the same weights, in float64."""
    settings = {"freeze_at": 2, "norm": "FrozenBN"} | settings
    body, _ = make_timm_body(name, [3, 4], **settings)
    indices = [
        item["index"]
        for item in timm.create_model(name, features_only=True).feature_info.info
        if item["reduction"] in (8, 16)
    ]
    timms = timm.create_model(name, features_only=True, out_indices=indices).eval()
    random_norms(timms)
    body.load_state_dict(without_counters(timms.state_dict()), strict=False)
    return body.double(), timms.double()


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_changes_no_map(name):
    body, timms = body_like_timms(name)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for ours, theirs in zip(body(images), timms(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    norms = [part for part in body.modules() if isinstance(part, FrozenNorm)]
    folded = [part for part in body.modules() if isinstance(part, FoldedConv2d)]
    assert sum(part.folded for part in norms) == len(folded)
    assert (len(norms), len(folded)) == FAMILIES[name]


def test_a_folded_convolution_is_trained_as_one_before_a_norm():
    body, timms = body_like_timms(LITE, freeze_at=0)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for network in (body, timms):  # timm's is in eval mode: its statistics are fixed, too
        sum(x.square().mean() for x in network(images)).backward()
    theirs = dict(timms.named_parameters())
    for name, parameter in body.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-12)


def test_frozen_stages_are_not_trained_and_keep_no_graph():
    body, _ = make_timm_body(LITE, [3, 4, 5], freeze_at=6, norm="BN")
    trained = {name[:8] for name, x in body.named_parameters() if x.requires_grad}
    assert trained == {"blocks.5", "blocks.6"}
    p3, p4, p5 = body.train()(torch.randn(1, 3, 64, 64))
    assert (p3.grad_fn, p4.grad_fn) == (None, None)
    assert p5.grad_fn is not None


def test_norms_of_frozen_stages_stay_and_others_move_with_bn():
    body, _ = make_timm_body(LITE, [3, 4], freeze_at=3, norm="BN")
    before = copy.deepcopy(body.state_dict())
    body.train()(torch.randn(2, 3, 64, 64))
    moved = {
        name.split(".")[1]
        for name, x in body.state_dict().items()
        if name.startswith("blocks.") and "running" in name and not x.equal(before[name])
    }
    assert moved == {"2", "3", "4"}  # the stem and blocks 0 and 1 are frozen


def test_a_copy_has_norms_of_its_own():
    body, _ = make_timm_body("resnet18", [3], freeze_at=2, norm="FrozenBN")
    images = torch.randn(1, 3, 32, 32)
    before = body(images)[0]
    clone = copy.deepcopy(body)
    clone.bn1.weight.zero_()
    assert body(images)[0].equal(before)
    assert not clone(images)[0].equal(before)


def test_a_body_draws_the_random_numbers_that_timm_draws():
    torch.manual_seed(0)
    timm.create_model("resnet18", features_only=True, out_indices=[2, 3])
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_timm_body("resnet18", [3, 4], freeze_at=2, norm="FrozenBN")
    assert torch.rand(1).equal(expected)


def test_a_torch_that_cannot_build_without_memory_gets_the_same_body(monkeypatch):
    settings = {"levels": [3, 4], "freeze_at": 2, "norm": "FrozenBN"}
    torch.manual_seed(0)
    expected, channels = make_timm_body("regnety_002", **settings)
    create, refusals = timm.create_model, []

    def create_with_memory(*args, **options):
        if torch.get_default_device().type == "meta":
            refusals.append(args)
            raise NotImplementedError("aten::_unique2")
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", create_with_memory)
    torch.manual_seed(0)
    body, same_channels = make_timm_body("regnety_002", **settings)
    assert refusals
    assert same_channels == channels
    state = body.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in expected.state_dict().items())


def test_a_body_can_be_described_without_memory():
    with torch.device("meta"):
        body, channels = make_timm_body(LITE, [3, 4, 5], freeze_at=6, norm="FrozenBN")
    assert channels == [40, 112, 320]
    assert all(x.is_meta for x in body.parameters())


@pytest.mark.parametrize(
    ("name", "levels", "freeze_at", "message"),
    [
        ("no_such_network", [3], 0, "timm .* has no such network"),
        ("convnext_atto", [1, 2], 0, r"its maps have the strides \[4, 8, 16, 32\], not \[2, 4\]"),
        ("vit_tiny_patch16_224", [3, 4], 0, r"strides \[16\]"),
        ("resnet18", [3, 4], 5, r"freeze_at = 5 .* \(must be 0\.\.4"),
    ],
)
def test_what_timm_does_not_have_is_refused_by_name(name, levels, freeze_at, message):
    with pytest.raises(ValueError, match=message):
        make_timm_body(name, levels, freeze_at=freeze_at, norm="BN")


def test_maps_of_a_body_become_a_pyramid_with_its_levels():
    backbone = build_backbone(
        BackboneOptions(name=f"timm:{LITE}", freeze_at=6),
        ResNetOptions(),
        FPNOptions(out_channels=16),
        levels=(3, 4, 5),
    )
    maps = backbone(torch.rand(1, 3, 128, 64))
    assert list(maps) == ["0", "1", "2", "pool"]
    assert [128 // x.shape[-2] for x in maps.values()] == [8, 16, 32, 64]
    assert "body.conv_stem.weight" in backbone.state_dict()  # as timm names it
