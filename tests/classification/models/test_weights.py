import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ssod_imwa.classification.models.cifar_resnet import CifarResNet
from ssod_imwa.classification.models.experts import Experts
from ssod_imwa.classification.models.heads import ScaledClassifier
from ssod_imwa.classification.models.torchvision_models import TorchvisionResNet
from ssod_imwa.classification.models.weights import (
    exported_state,
    load_encoder,
    resized_positions,
)
from ssod_imwa.classification.networks import load_weights
from ssod_imwa.errors import CheckpointError, WeightsError


def test_encoder_is_loaded_and_classifier_left_alone():
    torch.manual_seed(0)
    trained, model = CifarResNet(100, depth=8), CifarResNet(10, depth=8)
    trained(torch.randn(8, 3, 8, 8))  # moves the statistics of batch norm
    own = model.classifier.weight.clone()
    load_encoder(model, trained.state_dict(), source="x")
    for name, tensor in trained.state_dict().items():
        if not name.startswith("classifier."):
            assert model.state_dict()[name].equal(tensor), name
    assert model.classifier.weight.equal(own)


def test_classifiers_of_experts_are_left_alone():
    trained, model = (Experts(lambda: CifarResNet(10, depth=8), 2) for _ in range(2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    load_encoder(model, trained.state_dict(), source="x")
    for name, tensor in model.state_dict().items():
        source = before if ".classifier." in name else trained.state_dict()
        assert tensor.equal(source[name]), name


def test_states_without_step_counters_are_loaded():
    trained, model = CifarResNet(10, depth=8), CifarResNet(10, depth=8)
    state = {n: x for n, x in trained.state_dict().items() if "num_batches" not in n}
    load_encoder(model, state, source="an old file")
    assert model.stem[0].weight.equal(trained.stem[0].weight)


def test_nothing_is_loaded_if_anything_does_not_fit():
    torch.manual_seed(0)
    model = CifarResNet(10, depth=8)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = {name: x + 1 for name, x in before.items()}
    state["stem.0.weight"] = torch.zeros(8, 3, 3, 3)
    state["extra"] = torch.zeros(1)
    del state["layer1.0.conv1.weight"]
    with pytest.raises(WeightsError) as error:
        load_encoder(model, state, source="run/model.pth")
    assert str(error.value) == (
        "run/model.pth: does not fit: 1 missing: layer1.0.conv1.weight; 1 unknown: extra; "
        "1 of another shape: stem.0.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)"
    )
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())


def test_long_lists_are_cut():
    with pytest.raises(WeightsError, match=r"35 missing: .*, \.\.\. \(25 more\)$"):
        load_encoder(CifarResNet(10, depth=8), {}, source="x")


def test_a_state_of_another_network_is_not_listed():
    with pytest.raises(WeightsError, match="is of another network: none of its 2 tensors") as error:
        load_encoder(CifarResNet(10, depth=8), nn.Linear(1, 1).state_dict(), source="x")
    assert "more)" not in str(error.value)


def wrapped(network):
    state = {f"module.{name}": x for name, x in network.state_dict().items()}
    return {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_acc1": torch.ones(())}


def test_a_file_of_torchvisions_training_script_is_taken_under_our_names(tmp_path):
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    torch.save(wrapped(theirs), tmp_path / "checkpoint.pth.tar")
    model = TorchvisionResNet("resnet18", 10).eval()
    load_weights(model, str(tmp_path / "checkpoint.pth.tar"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images))


def test_the_classifier_of_another_programs_file_is_left_if_it_is_not_wanted(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(wrapped(theirs), tmp_path / "x.pth")
    model = TorchvisionResNet("resnet18", 10)
    load_weights(model, str(tmp_path / "x.pth"), keep_classifier=False)
    assert model.state_dict()["stem.conv1.weight"].equal(theirs.conv1.weight)
    with pytest.raises(WeightsError, match=r"is of another network than CLS\.MODEL"):
        load_weights(model, str(tmp_path / "x.pth"))


def test_a_compiled_model_of_ours_is_taken(tmp_path):
    trained, model = CifarResNet(10, depth=8), CifarResNet(10, depth=8)
    state = {f"_orig_mod.{name}": x for name, x in trained.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    load_weights(model, str(tmp_path / "x.pth"))
    assert all(x.equal(trained.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_runs_file_without_its_digest_is_refused(tmp_path):
    state = CifarResNet(10, depth=8).state_dict()
    torch.save({"student": state, "inference_model": "student"}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"its digest file .* does not exist"):
        load_weights(CifarResNet(10, depth=8), str(tmp_path / "model_final.pth"))


@pytest.mark.parametrize("side", [3, 6])
def test_positions_are_resized_as_maps_without_the_class_token(side):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 16, 3)
    resized = resized_positions(positions, torch.empty(1, 1 + side * side, 3))
    grid = positions[:, 1:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    assert resized[:, 0].equal(positions[:, 0])
    assert torch.allclose(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 3))


def test_positions_that_cannot_be_resized_are_returned():
    positions = torch.randn(1, 1 + 16, 3)
    assert resized_positions(positions, torch.empty(1, 17, 3)) is positions
    assert resized_positions(positions, torch.empty(1, 1 + 12, 3)) is positions  # no square


def test_a_scaled_classifier_is_exported_as_the_linear_one_that_it_equals():
    torch.manual_seed(0)
    model = CifarResNet(10, depth=8).eval()
    model.classifier = ScaledClassifier(model.classifier)
    nn.init.uniform_(model.classifier.scale, 0.5, 2)
    plain = CifarResNet(10, depth=8).eval()
    plain.load_state_dict(exported_state(model))
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(plain(images), model(images), atol=1e-6)
