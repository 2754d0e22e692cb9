import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.freezing import reset_last_block, train_only
from ssod_imwa.classification.models.vit import ViT, layer_decay_groups
from ssod_imwa.classification.models.weights import (
    exported_state,
    load_encoder,
    renamed_from_library,
)
from ssod_imwa.errors import WeightsError

SMALL = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3}


def small(classes=5, **changes):
    torch.manual_seed(0)
    return ViT(classes, **{**SMALL, **changes})


def timms(classes=5, **changes):
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=classes,
        global_pool="avg",
        **changes,
    )


@pytest.mark.parametrize("image_size", [224, 384])
def test_defaults_are_timms_vit_b_16(image_size):
    with torch.device("meta"):
        ours = ViT(1000, image_size=image_size)
        theirs = timm.create_model(
            "vit_base_patch16_224", global_pool="avg", num_classes=1000, img_size=image_size
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == 86_567_656 + ((image_size // 16) ** 2 - 196) * 768
    exported = {name: x.shape for name, x in exported_state(ours).items()}
    assert exported == {name: x.shape for name, x in theirs.state_dict().items()}
    assert len(ours.groups) == 13


def test_logits_are_those_of_timm_with_the_exported_weights():
    ours, theirs = small().eval(), timms().eval()
    nn.init.normal_(ours.classifier.weight)
    nn.init.normal_(ours.stem.cls_token)
    theirs.load_state_dict(exported_state(ours))
    images = torch.randn(3, 3, 16, 16)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    tokens = theirs.forward_features(images)
    features = theirs.forward_head(tokens, pre_logits=True)
    assert torch.allclose(ours.features(images), features, atol=1e-5)
    assert ours.num_features == 24


def test_weights_of_timm_are_loaded_under_our_names():
    torch.manual_seed(1)
    theirs, ours = timms(9).eval(), small(5).eval()
    load_encoder(ours, renamed_from_library(ours, theirs.state_dict()), source="timm")
    images = torch.randn(2, 3, 16, 16)
    tokens = theirs.forward_features(images)
    expected = theirs.forward_head(tokens, pre_logits=True)
    assert torch.allclose(ours.features(images), expected, atol=1e-5)


def test_drop_path_is_timms_and_grows_with_depth():
    ours, theirs = small(drop_path=0.4), timms(drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in ours.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4])
    theirs.load_state_dict(exported_state(ours))
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(3)
    expected = theirs.train()(images)
    torch.manual_seed(3)
    assert torch.allclose(ours.train()(images), expected, atol=1e-7)
    assert ours.eval()(images).equal(ours(images))


def test_classifier_begins_near_zero_and_the_encoder_as_in_timm():
    model = small(100, dim=96, classifier="linear")
    weight = model.classifier.weight
    assert abs(weight.std().item() / 2e-5 - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert not model.classifier.bias.any()
    inner = model.blocks[1].mlp.fc1.weight
    assert abs(inner.std().item() / 0.02 - 1) < 5 / (2 * inner.numel()) ** 0.5


def test_last_block_is_drawn_anew_as_it_was_built():
    model = small(100, dim=96)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    reset_last_block(model)
    inner = model.blocks[2].attn.qkv.weight
    assert abs(inner.std().item() / 0.02 - 1) < 5 / (2 * inner.numel()) ** 0.5
    assert model.blocks[2].norm1.weight.eq(1).all()
    assert model.blocks[1].norm1.weight.eq(7).all()
    assert model.stem.pos_embed.eq(7).all()


def test_weights_of_another_image_size_are_loaded_with_resized_positions():
    trained, model = small(9), small(5, image_size=24)
    nn.init.normal_(trained.stem.pos_embed)
    load_encoder(model, trained.state_dict(), source="x")
    grid = trained.stem.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    positions = model.stem.pos_embed
    assert torch.allclose(positions[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 36, 24))
    assert positions[:, 0].equal(trained.stem.pos_embed[:, 0])
    assert model.blocks[2].mlp.fc2.weight.equal(trained.blocks[2].mlp.fc2.weight)
    with pytest.raises(WeightsError, match=r"stem.patch_embed.proj.weight \(24, 3, 4, 4\) instead"):
        load_encoder(small(patch_size=8), trained.state_dict(), source="x")


def test_last_block_of_a_transformer_is_its_last_group():
    model = small()
    train_only(model, "last_block")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".weight")[0].split(".bias")[0].split(".")[0] for name in names} == {
        "blocks",
        "fc_norm",
        "classifier",
    }
    assert {name[:9] for name in names if name.startswith("blocks")} == {"blocks.2."}


def test_gradients_reach_every_parameter():
    model = small(4)
    nn.init.normal_(model.classifier.weight)
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("layer_decay", [0.75, 0.65, 1.0])
def test_layer_decay_is_timms(layer_decay):
    ours, theirs = small(), timms()
    groups = layer_decay_groups(ours, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    expected = param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=layer_decay
    )

    def by_name(model, groups, rate):
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: (rate(g), g["weight_decay"]) for g in groups for p in g["params"]}

    mine = by_name(ours, groups, lambda group: group["lr"])
    theirs_by_name = by_name(theirs, expected, lambda group: 0.1 * group["lr_scale"])
    renamed = renamed_from_library(ours, theirs_by_name)
    assert mine.keys() == renamed.keys()
    for name, numbers in renamed.items():
        assert mine[name] == pytest.approx(numbers), name
    assert all(group["initial_lr"] == group["lr"] for group in groups)


def test_layer_decay_follows_the_formula_and_leaves_frozen_parts_out():
    model = CifarResNet(10, depth=8)
    train_only(model, "last_block")
    groups = layer_decay_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {p for p in model.parameters() if p.requires_grad}
    assert rates[model.layer3[0].conv1.weight] == 0.5
    assert rates[model.classifier.weight] == 1.0
    torch.optim.AdamW(groups)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        layer_decay_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match="layer_decay = 0 is not allowed"):
        layer_decay_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, r"image_size = 18 is not allowed .*multiple of the patch size, 4"),
        ({"dim": 25}, r"dim = 25 is not allowed .*heads = 3"),
        ({"drop_path": 1.0}, r"drop_path = 1.0 is not allowed"),
        ({"classifier": "token"}, r"classifier = 'token' is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
