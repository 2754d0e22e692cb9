from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, get_model_weights

from ssod_imwa.classification.models.torchvision_models import NAMES, TorchvisionResNet
from ssod_imwa.classification.models.weights import exported_state, renamed_from_library
from ssod_imwa.errors import WeightsError


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# The numbers that torchvision documents for 1000 classes.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnext50_32x4d", 25_028_904),
    ],
)
def test_parameters_are_the_published_number(name, expected):
    with torch.device("meta"):
        model = TorchvisionResNet(name, 1000)
    assert parameters(model) == expected


@pytest.mark.parametrize("name", NAMES)
def test_exported_names_and_shapes_are_those_of_torchvision(name):
    with torch.device("meta"):
        ours, theirs = TorchvisionResNet(name, 7), get_model(name, num_classes=7)
    exported = {n: x.shape for n, x in exported_state(ours).items()}
    assert exported == {n: x.shape for n, x in theirs.state_dict().items()}
    back = renamed_from_library(ours, exported_state(ours))
    assert back.keys() == ours.state_dict().keys()


def test_logits_are_those_of_torchvision_with_the_exported_weights():
    torch.manual_seed(0)
    ours, theirs = TorchvisionResNet("resnet18", 7).eval(), get_model("resnet18", num_classes=7)
    theirs.load_state_dict(exported_state(ours))
    images = torch.randn(2, 3, 64, 64)
    logits = ours(images)
    assert torch.allclose(logits, theirs.eval()(images), atol=1e-5)
    assert torch.allclose(logits, F.linear(ours.features(images), *ours.classifier.parameters()))


def test_small_stem_keeps_the_resolution():
    torch.manual_seed(0)
    model = TorchvisionResNet("resnet18", 5, small_stem=True).eval()
    x, shapes = torch.zeros(1, 3, 64, 64), []
    for group in model.groups:
        x = group(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 64, 64), (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8)]
    # 27 * 64 weights in place of 3 * 49 * 64.
    assert parameters(model) == 11_689_512 - 513 * 995 - (147 - 27) * 64
    weight = model.stem.conv1.weight
    assert abs(weight.std().item() / (2 / (9 * 64)) ** 0.5 - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_classifier_can_be_a_cosine_that_is_not_exported():
    with torch.device("meta"):
        model = TorchvisionResNet("resnet50", 7, classifier="cosine", scale=16.0)
    assert model.classifier.scale == 16.0
    with pytest.raises(ValueError, match="a CosineClassifier cannot be exported"):
        exported_state(model)


def test_pretrained_weights_are_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    trained = get_model("resnet18")
    file = tmp_path / "checkpoints" / get_model_weights("resnet18").IMAGENET1K_V1.url.split("/")[-1]
    torch.save(trained.state_dict(), file)
    model = TorchvisionResNet("resnet18", 7, pretrained=True)
    expected = renamed_from_library(model, trained.state_dict())
    for name, tensor in model.state_dict().items():
        assert name.startswith("classifier.") or tensor.equal(expected[name]), name
    assert model.classifier.weight.shape == (7, 512)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"resnet18.*\.pth: is damaged"):
        TorchvisionResNet("resnet18", 7, pretrained=True)


def test_weights_that_cannot_be_downloaded_are_a_clear_error(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(WeightsError, match=r"resnet18.*cannot be fetched .*no route.* save it as"):
        TorchvisionResNet("resnet18", 7, pretrained=True)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"name = 'resnet20' is not allowed .*'resnet18'"):
        TorchvisionResNet("resnet20", 7)
    with pytest.raises(ValueError, match="pretrained = True is not allowed with small_stem"):
        TorchvisionResNet("resnet18", 7, small_stem=True, pretrained=True)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = TorchvisionResNet("resnet18", 4, small_stem=True)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())
