import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssod_imwa.classification.models import CifarResNet, CosineClassifier
from ssod_imwa.classification.models.cifar_resnet import BasicBlock


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# He et al., arXiv 1512.03385, table 6: millions of parameters by depth.
@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_parameters_are_the_published_number(depth, millions):
    model = CifarResNet(10, depth=depth)
    digits = 1 if depth == 110 else 2
    assert round(parameters(model) / 1e6, digits) == millions


@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_are_those_counted_by_hand(classes):
    model = CifarResNet(classes)
    # 3x3 convolutions without bias, two numbers of batch norm a channel; ten layers a stage.
    stem = 27 * 16 + 32
    stages = sum(
        9 * before * width + 9 * 9 * width * width + 10 * 2 * width
        for before, width in [(16, 16), (16, 32), (32, 64)]
    )
    assert parameters(model) == stem + stages + 64 * classes + classes
    assert parameters(model) == {10: 464_154, 100: 470_004}[classes]


def test_stages_halve_the_maps_and_double_the_channels():
    model = CifarResNet(10, depth=20).eval()
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for group in model.groups:
        x = group(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [len(stage) for stage in model.groups[1:]] == [3, 3, 3]


def test_logits_are_the_classifier_of_the_pooled_groups():
    torch.manual_seed(0)
    model = CifarResNet(7, depth=8).eval()
    images = torch.randn(3, 3, 32, 32)
    maps = images
    for group in model.groups:
        maps = group(maps)
    features = F.adaptive_avg_pool2d(maps, 1).flatten(1)
    assert torch.allclose(model.features(images), features, atol=1e-6)
    assert torch.allclose(model(images), F.linear(features, *model.classifier.parameters()))
    assert model.num_features == 64


def test_shortcut_takes_every_second_pixel_and_pads_channels_with_zero():
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 6, 6)
    expected = torch.zeros(1, 4, 3, 3)
    for c in range(2):
        for row in range(3):
            for column in range(3):
                expected[0, c + 1, row, column] = x[0, c, 2 * row, 2 * column]
    assert block(x).equal(expected)


def test_block_is_convolutions_with_batch_norm_beside_its_input():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, stride=1).train()
    x = torch.randn(5, 4, 6, 6)

    def normalized(maps):
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), False, keepdim=True)
        return (maps - mean) / (var + 1e-5).sqrt()

    inner = normalized(F.conv2d(x, block.conv1.weight, padding=1)).relu()
    inner = normalized(F.conv2d(inner, block.conv2.weight, padding=1))
    assert torch.allclose(block(x), (inner + x).relu(), atol=1e-5)


def test_weights_are_kaiming_normal():
    torch.manual_seed(0)
    model = CifarResNet(100)
    # The standard deviation estimated from n normal numbers has a relative error of sqrt(1/2n).
    for weight in (model.layer3[1].conv1.weight, model.layer2[3].conv2.weight):
        expected = (2 / (9 * weight.shape[1])) ** 0.5
        error = (1 / (2 * weight.numel())) ** 0.5
        assert abs(weight.std().item() / expected - 1) < 5 * error
    std = model.classifier.weight.std().item()
    assert abs(std / (2 / 64) ** 0.5 - 1) < 5 / (2 * 6400) ** 0.5


def test_classifier_can_be_a_cosine():
    model = CifarResNet(10, depth=8, classifier="cosine", scale=16.0)
    assert isinstance(model.classifier, CosineClassifier)
    assert model.classifier.scale == 16.0


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = CifarResNet(4, depth=8)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("depth", [2, 9, 18, 34])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"depth = {depth} is not allowed"):
        CifarResNet(10, depth=depth)
