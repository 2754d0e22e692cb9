import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.models import CosineClassifier, WideResNet
from ssod_imwa.classification.models.freezing import train_only
from ssod_imwa.classification.models.wide_resnet import PreActivationUnit, WideResNetOptions


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def uninitialized(monkeypatch):
    """Counting needs no random weights, which take a second for 36 million."""
    for name in ("kaiming_uniform_", "kaiming_normal_"):
        monkeypatch.setattr(nn.init, name, lambda weight, *_, **__: weight)


# WRN-28-2 and WRN-28-8 of semi-supervised work.
@pytest.mark.parametrize(
    ("width", "classes", "expected"),
    [(2, 10, 1_467_610), (2, 100, 1_479_220), (8, 100, 23_401_012)],
)
@pytest.mark.usefixtures("uninitialized")
def test_parameters_are_the_number_of_the_released_code(width, classes, expected):
    model = WideResNet(classes, width=width)
    assert parameters(model) == expected


# Zagoruyko and Komodakis, arXiv 1605.07146: millions of parameters by depth and width.
@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)],
)
@pytest.mark.usefixtures("uninitialized")
def test_parameters_are_the_published_number(depth, width, millions):
    model = WideResNet(10, depth=depth, width=width)
    assert round(parameters(model) / 1e6, 1) == millions


def test_stages_halve_the_maps_and_double_the_channels():
    model = WideResNet(10).eval()
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for group in model.groups:
        x = group(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert [len(stage) for stage in model.groups[1:]] == [4, 4, 4]
    assert model.num_features == 128


def test_only_the_first_unit_activates_its_shortcut():
    model = WideResNet(10, depth=16)
    units = [unit for stage in model.groups[1:] for unit in stage]
    assert [unit.activate_shortcut for unit in units] == [True] + [False] * 5
    kinds = [type(unit.shortcut) for unit in units]
    assert kinds == [nn.Conv2d, nn.Identity] * 3


@pytest.mark.parametrize("activate_shortcut", [False, True])
def test_unit_is_what_its_definition_says(activate_shortcut):
    torch.manual_seed(0)
    unit = PreActivationUnit(
        3, 5, stride=2, momentum=0.1, activate_shortcut=activate_shortcut
    ).train()
    x = torch.randn(6, 3, 8, 8)

    def activated(maps):
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), False, keepdim=True)
        maps = (maps - mean) / (var + 1e-5).sqrt()
        return torch.where(maps > 0, maps, 0.1 * maps)

    inner = F.conv2d(activated(x), unit.conv1.weight, stride=2, padding=1)
    inner = F.conv2d(activated(inner), unit.conv2.weight, padding=1)
    source = activated(x) if activate_shortcut else x
    # A 1 x 1 convolution of stride 2 is a matrix on every second pixel.
    matrix = unit.shortcut.weight[:, :, 0, 0]
    shortcut = torch.einsum("oc,nchw->nohw", matrix, source[:, :, ::2, ::2])
    assert torch.allclose(unit(x), inner + shortcut, atol=1e-5)


def test_features_are_normalized_activated_and_pooled_maps():
    torch.manual_seed(0)
    model = WideResNet(7, depth=10, width=1).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    images = torch.randn(3, 3, 32, 32)
    maps = images
    for group in model.groups:
        maps = group(maps)
    mean, var = model.bn.running_mean[:, None, None], model.bn.running_var[:, None, None]
    features = F.leaky_relu((maps - mean) / (var + 1e-5).sqrt(), 0.1).flatten(2).mean(2)
    assert torch.allclose(model.features(images), features, atol=1e-5)
    assert torch.allclose(
        model(images), F.linear(features, *model.classifier.parameters()), atol=1e-5
    )


def test_weights_are_drawn_as_fixmatch_does():
    torch.manual_seed(0)
    model = WideResNet(100)
    # The standard deviation estimated from n normal numbers has a relative error of sqrt(1/2n).
    for weight in (model.layer3[0].conv1.weight, model.layer2[0].shortcut.weight):
        outputs = weight.shape[0] * weight.shape[2] * weight.shape[3]
        error = (1 / (2 * weight.numel())) ** 0.5
        assert abs(weight.std().item() / (2 / outputs) ** 0.5 - 1) < 5 * error
    linear = model.classifier.weight
    expected = (2 / (128 + 100)) ** 0.5
    assert abs(linear.std().item() / expected - 1) < 5 / (2 * linear.numel()) ** 0.5
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("momentum", [0.001, 0.1])
def test_momentum_is_that_of_every_batch_norm(momentum):
    model = WideResNet(10, depth=10, options=WideResNetOptions(bn_momentum=momentum))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 7
    assert {norm.momentum for norm in norms} == {momentum}


def test_raw_pre_activation_is_the_network_whose_first_norm_is_thrown_away():
    """As FM-PT and ACR have it: unit by unit, the first convolution and the shortcut see x."""
    torch.manual_seed(0)
    raw = WideResNet(4, depth=16, width=1, options=WideResNetOptions(pre_activation="raw")).eval()
    x = torch.randn(2, 3, 16, 16)
    maps = raw.layer1(raw.stem(x))
    for stage in (raw.layer2, raw.layer3):
        first, second = stage
        inner = first.conv2(F.leaky_relu(first.bn2(first.conv1(maps)), 0.1))
        maps = inner + F.conv2d(maps, first.shortcut.weight, stride=2)
        active = F.leaky_relu(second.bn1(maps), 0.1)
        maps = maps + second.conv2(F.leaky_relu(second.bn2(second.conv1(active)), 0.1))
    torch.testing.assert_close(raw(x), raw.classifier(raw.pool(maps)), atol=1e-5, rtol=1e-5)
    usual = WideResNet(4, depth=16, width=1).eval()
    usual.load_state_dict(raw.state_dict())  # equal names and shapes
    assert not torch.allclose(usual(x), raw(x), atol=1e-3)


def test_what_raw_pre_activation_throws_away_is_not_trained():
    model = WideResNet(4, depth=10, width=1, options=WideResNetOptions(pre_activation="raw"))
    train_only(model, "all")
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {f"layer{i}.0.bn1.{name}" for i in (2, 3) for name in ("weight", "bias")}
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_classifier_can_be_a_cosine():
    classifier = WideResNet(10, depth=10, width=1, classifier="cosine").classifier
    assert isinstance(classifier, CosineClassifier)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = WideResNet(4, depth=10, width=1)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("depth", [4, 12, 26])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth = {depth} is not allowed"):
        WideResNet(10, depth=depth)


def test_width_has_to_be_positive():
    with pytest.raises(ValueError, match="width = 0 is not allowed"):
        WideResNet(10, width=0)
