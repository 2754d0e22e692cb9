import pytest
import torch
from torch import nn

from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.freezing import (
    PARTS,
    reset_last_block,
    set_train_mode,
    train_only,
)
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.classification.models.library_models import LibraryClassifier
from ssod_imwa.classification.models.torchvision_models import TorchvisionResNet
from ssod_imwa.classification.models.wide_resnet import WideResNet

# Beginnings of the names that are trained in a ResNet-14, whose stages have two blocks.
TRAINED = {
    "all": ("",),
    "backbone": ("stem", "layer"),
    "classifier": ("classifier",),
    "last_block": ("layer3.1", "classifier"),
    "last_block_and_norms": ("layer3.1", "classifier"),
    "last_block_only": ("layer3.1",),
    "scale": ("classifier.scale",),
}


def scaled():
    torch.manual_seed(0)
    model = CifarResNet(5, depth=14)
    model.classifier = ScaledClassifier(model.classifier)
    return model


def step(model):
    """One step of SGD; returns the names of parameters and of statistics that changed."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(torch.randn(10, 3, 8, 8)), torch.arange(10) % 5).backward()
    optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not x.equal(before[name])}
    return {n for n, _ in model.named_parameters()} & changed, {
        name for name in changed if "running" in name
    }


@pytest.mark.parametrize("part", PARTS)
def test_a_step_changes_the_part_and_its_statistics_alone(part):
    model = scaled()
    train_only(model, part)
    parameters, statistics = step(model)
    everything = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers() if "running" in name}
    trained = {name for name in everything | buffers if name.startswith(TRAINED[part])}
    if part == "last_block_and_norms":
        norms = {n for n, x in model.named_modules() if isinstance(x, nn.BatchNorm2d)}
        trained |= {name for name in everything | buffers if name.rpartition(".")[0] in norms}
    assert parameters == everything & trained
    assert statistics == buffers & trained


def test_the_part_that_was_trained_before_does_not_matter():
    model = scaled()
    train_only(model, "classifier")
    train_only(model, "last_block_only")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name[:9] for name in names} == {"layer3.1."}


def test_frozen_statistics_move_if_asked():
    model = scaled()
    train_only(model, "classifier")
    set_train_mode(model, "classifier", move_statistics="all")
    parameters, statistics = step(model)
    assert all(name.startswith("classifier") for name in parameters)
    assert statistics == {name for name, _ in model.named_buffers() if "running" in name}


def test_statistics_of_the_last_block_move_alone_if_asked():
    model = scaled()
    train_only(model, "classifier")
    set_train_mode(model, "classifier", move_statistics="last_block")
    last = {f"layer3.1.{name}" for name, _ in model.layer3[1].named_buffers() if "running" in name}
    assert last
    assert step(model)[1] == last


def test_moved_statistics_are_those_of_training():
    frozen, trained = scaled(), scaled()
    set_train_mode(frozen, "classifier", move_statistics="all")
    images = torch.randn(4, 3, 8, 8)
    assert frozen(images).equal(trained.train()(images))
    assert frozen.layer2[0].bn1.running_mean.equal(trained.layer2[0].bn1.running_mean)


def test_train_mode_comes_back_after_an_evaluation_and_dropout_stays_off():
    model = scaled()
    model.layer2.append(nn.Dropout(0.5))
    for move_statistics in ("none", "all"):
        model.eval()
        set_train_mode(model, "classifier", move_statistics=move_statistics)
        assert model.training
        assert model.classifier.training
        assert model.stem[1].training is (move_statistics == "all")
        assert not model.layer2[-1].training
    train_only(model, "all")
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_what_follows_the_groups_belongs_to_the_last_block():
    model = WideResNet(5, depth=16, width=1)
    train_only(model, "last_block")
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layer3", "bn", "classifier"}
    assert model.bn.training
    assert not model.layer3[0].bn1.training
    train_only(model, "classifier")
    assert not model.bn.training
    assert not model.bn.weight.requires_grad


def test_places_trains_the_last_bottleneck_of_resnet152():
    with torch.device("meta"):
        model = TorchvisionResNet("resnet152", 365)
    train_only(model, "last_block")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in names} == {
        "layer4.2",
        "classifier.weight",
        "classifier.bias",
    }


def test_paco_on_places_trains_all_batch_norms_of_resnet152_on_batch_statistics():
    with torch.device("meta"):
        model = TorchvisionResNet("resnet152", 365)
    train_only(model, "last_block_and_norms")
    norms = {n: x for n, x in model.named_modules() if isinstance(x, nn.BatchNorm2d)}
    assert len(norms) == 155
    assert all(
        x.training and x.weight.requires_grad and x.bias.requires_grad for x in norms.values()
    )
    others = {name for name, p in model.named_parameters() if p.requires_grad}
    others = {name for name in others if name.rpartition(".")[0] not in norms}
    assert others == {
        *(f"layer4.2.conv{i}.weight" for i in (1, 2, 3)),
        "classifier.weight",
        "classifier.bias",
    }


def test_experts_are_frozen_alike():
    model = Experts(lambda: CifarResNet(5, depth=8), 2, shared_groups=2)
    train_only(model, "classifier")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [f"experts.{k}.classifier.{n}" for k in (0, 1) for n in ("weight", "bias")]
    assert [expert.layer1.training for expert in model.experts] == [False, False]


def test_unknown_parts_and_missing_scales_are_refused():
    model = CifarResNet(5, depth=8)
    with pytest.raises(ValueError, match=r"part = 'head' is not allowed .*'all', 'backbone'"):
        train_only(model, "head")
    with pytest.raises(ValueError, match=r"'scale' is not allowed with a Linear"):
        train_only(model, "scale")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_networks_without_blocks_have_no_last_one(name):
    model = LibraryClassifier(name, 3, image_size=32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for part in ("last_block", "last_block_and_norms", "last_block_only"):
        with pytest.raises(ValueError, match=rf"'{part}' is not allowed with {name}, .* \(must be"):
            train_only(model, part)
    with pytest.raises(ValueError, match=rf"True is not allowed with {name}, .*\(must be False\)"):
        reset_last_block(model)
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    train_only(model, "classifier")
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "classifier"
    }


def test_last_block_is_drawn_anew_as_it_was_built():
    torch.manual_seed(0)
    model = TorchvisionResNet("resnet18", 5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean.fill_(3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    reset_last_block(model)
    for name, x in model.state_dict().items():
        if not name.startswith("layer4.1"):
            assert x.equal(before[name]), name
    block = model.layer4[1]
    assert block.bn2.weight.eq(1).all()
    assert block.bn1.running_mean.eq(0).all()
    weight = block.conv1.weight
    assert not weight.equal(before["layer4.1.conv1.weight"])
    assert abs(weight.std().item() / (2 / (9 * 512)) ** 0.5 - 1) < 5 / (2 * weight.numel()) ** 0.5


def test_each_expert_is_drawn_anew_and_differently():
    torch.manual_seed(0)
    model = Experts(lambda: CifarResNet(5, depth=8), 2, shared_groups=2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    reset_last_block(model)
    changed = {n for n, p in model.named_parameters() if not p.eq(7).all()}
    assert changed == {n for n, _ in model.named_parameters() if ".layer3." in n}
    a, b = (expert.layer3.state_dict().values() for expert in model.experts)
    assert any(not x.equal(y) for x, y in zip(a, b, strict=True))
