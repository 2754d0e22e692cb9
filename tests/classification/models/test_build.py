import pytest
import torch
import torch.nn.functional as F

from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.models.build import (
    MODELS,
    ON_FEATURES,
    Settings,
    build_classifier,
    find_layer,
)
from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.classifiers import CosineClassifier
from ssod_imwa.classification.models.experts import Experts

SIZES = {"vit_base_patch16": 224, "vit_tiny_patch4_32": 32}
# Small enough to be run on a CPU in a unit test.
RUN = ["cifar_resnet20", "wrn_28_2", "resnet18", "resnet18_small", "vit_tiny_patch4_32"]


def build(name, classes=6, **options):
    torch.manual_seed(0)
    return build_classifier(name, Settings(classes, SIZES.get(name, 32), **options))


def test_the_models_are_those_of_the_papers():
    assert sorted(MODELS) == [
        "cifar_resnet20",
        "cifar_resnet32",
        "cifar_resnet44",
        "cifar_resnet56",
        "feature_head",
        "feature_tail",
        "resnet101",
        "resnet12",
        "resnet152",
        "resnet18",
        "resnet18_small",
        "resnet34",
        "resnet34_small",
        "resnet50",
        "resnet50_small",
        "resnext50_32x4d",
        "vit_base_patch16",
        "vit_tiny_patch4_32",
        "wrn_28_2",
        "wrn_28_8",
    ]


# Millions of parameters with 1000 classes, or with 10 for small images.
@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("cifar_resnet32", 10, 0.464),
        ("wrn_28_2", 10, 1.468),
        ("resnet50", 1000, 25.557),
        # 25,557,032 without the 1000-way classifier and the 7 x 7 stem, with 127 classes and 3 x 3.
        ("resnet50_small", 127, 23.761),
        ("resnext50_32x4d", 1000, 25.029),
        ("resnet152", 1000, 60.193),
        ("resnet34_small", 10, 21.282),
        ("vit_base_patch16", 1000, 86.568),
    ],
)
def test_names_give_networks_of_the_published_size(name, classes, millions):
    with torch.device("meta"):
        model = build(name, classes)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ON_FEATURES])
def test_every_network_of_images_keeps_the_contract(name):
    with torch.device("meta"):
        model = build(name)
        size = SIZES.get(name, 64)
        images = torch.zeros(2, 3, size, size)
        features = model.eval().features(images)
        assert features.shape == (2, model.num_features)
        assert model(images).shape == model.classifier(features).shape == (2, 6)
    assert isinstance(model, ImageClassifier)
    assert len(model.groups) == len(model.group_names) > 2
    assert all(
        find_layer(model, group) is module
        for group, module in zip(model.group_names, model.groups, strict=True)
    )


@pytest.mark.parametrize("name", RUN)
def test_cosine_logits_are_the_scaled_cosines_of_the_features(name):
    model = build(name, classifier="cosine", scale=16.0).eval()
    assert isinstance(model.classifier, CosineClassifier)
    images = torch.randn(2, 3, 32, 32)
    features = model.features(images)
    expected = 16 * F.cosine_similarity(features[:, None], model.classifier.weight[None], dim=2)
    assert torch.allclose(model(images), expected, atol=1e-4)


@pytest.mark.parametrize("name", RUN)
def test_mixing_after_any_group_is_mixing_what_the_next_one_gets(name):
    model = build(name).eval()
    images = torch.randn(3, 3, 32, 32)
    for at, group in enumerate(model.group_names):
        values = images
        for module in model.groups[: at + 1]:
            values = module(values)
        values = 0.7 * values + 0.3 * values.flip(0)
        for module in model.groups[at + 1 :]:
            values = module(values)
        expected = model.classifier(model.pool(values))
        hook = find_layer(model, group).register_forward_hook(
            lambda module, inputs, output: 0.7 * output + 0.3 * output.flip(0)
        )
        assert torch.allclose(model(images), expected, atol=1e-5), group
        hook.remove()


def test_drop_path_and_image_size_reach_vision_transformers():
    settings = Settings(6, image_size=48, drop_path=0.2)
    model = build_classifier("vit_tiny_patch4_32", settings)
    assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.2)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_50", {}, r"model = 'resnet_50' is not allowed, did you mean 'resnet50'\?"),
        ("lenet", {}, r"model = 'lenet' is not allowed.* \(must be one of \['cifar_resnet20'"),
        ("cifar_resnet32", {"pretrained": True}, r"pretrained = True is not allowed with model"),
        ("resnet18_small", {"pretrained": True}, r"pretrained = True is not allowed with model"),
        ("resnet18", {"drop_path": 0.1}, r"drop_path = 0.1 is not allowed with model"),
        ("resnet18", {"classes": 0}, r"classes = 0 is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_layers_are_found_by_dotted_names():
    model = CifarResNet(5, depth=14)
    assert find_layer(model, "layer3.1") is model.layer3[1]
    assert find_layer(model, "stem") is model.stem
    experts = Experts(lambda: CifarResNet(5, depth=8), 2, shared_groups=1)
    assert find_layer(experts, "experts.1.stem") is experts.experts[0].stem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer4", r"layer = 'layer4' is not allowed, did you mean 'layer\d'\?"),
        ("layer3.9", r"layer = 'layer3.9' is not allowed, did you mean 'layer3\.\d'\?"),
        (
            "",
            r"layer = '' is not allowed \(must be one of \['stem', 'layer1', .*'layer3'\]",
        ),
    ],
)
def test_unknown_layers_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_layer(CifarResNet(5, depth=8), name)


def test_message_for_experts_names_their_groups():
    experts = Experts(lambda: CifarResNet(5, depth=8), 2)
    with pytest.raises(ValueError, match=r"\['experts.0.stem', 'experts.0.layer1'"):
        find_layer(experts, "layer1")
