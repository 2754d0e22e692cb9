import collections
import logging
import pickle
import urllib.error
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from support import detector_options
from torch import nn

from ssod_imwa.detection.detectors import base, torchvision_detector
from ssod_imwa.detection.detectors.caffe import read_caffe_resnet
from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN
from ssod_imwa.detection.detectors.weights import load_strictly
from ssod_imwa.engine.checkpoint.packages import PIXEL_MEAN, PIXEL_STD
from ssod_imwa.errors import UserError, WeightsError

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SMALL = detector_options(
    backbone={"freeze_at": 0},
    resnets={"depth": 18, "norm": "BN"},
    fpn={"out_channels": 8},
    roi_box_head={"fc_dim": 8},
)
CAFFE = detector_options(
    SMALL,
    resnets={"depth": 50, "stride_in_1x1": True},
    image={"format": "BGR"},
    pixels={"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0, 1.0, 1.0]},
)
FROZEN = {"backbone": {"freeze_at": 2}, "resnets": {"norm": "FrozenBN"}}


def small_detector(seed=0, base=SMALL, num_classes=3, **groups):
    torch.manual_seed(seed)
    return TorchvisionFasterRCNN(detector_options(base, **groups), num_classes=num_classes)


def equal_states(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(x, second[k]) for k, x in first.items()
    )


def caffe_blobs(blocks_of_stages):
    """Random arrays by the names of Caffe2's ResNets, written out independently of the reader."""
    rng = np.random.default_rng(0)

    def norm(name, channels):
        return {
            f"{name}_bn_s": 1 + rng.standard_normal(channels, np.float32) / 10,
            f"{name}_bn_b": rng.standard_normal(channels, np.float32) / 10,
        }

    def convolution(name, out, inner, size):
        scale = np.float32((2 / (inner * size * size)) ** 0.5)
        return {f"{name}_w": scale * rng.standard_normal((out, inner, size, size), np.float32)}

    blobs = {**convolution("conv1", 64, 3, 7), **norm("res_conv1", 64)}
    inner = 64
    for stage, blocks in enumerate(blocks_of_stages):
        width = 64 * 2**stage
        for block in range(blocks):
            unit = f"res{stage + 2}_{block}"
            layers = [("branch2a", width, inner, 1), ("branch2b", width, width, 3)]
            layers += [("branch2c", 4 * width, width, 1)]
            if block == 0:
                layers.append(("branch1", 4 * width, inner, 1))
            for branch, out, channels, size in layers:
                blobs |= convolution(f"{unit}_{branch}", out, channels, size)
                blobs |= norm(f"{unit}_{branch}", out)
            inner = 4 * width
    return {**blobs, "fc1000_w": np.zeros((1, 1)), "fc1000_b": np.zeros(1), "conv1_w_momentum": 0}


def caffe_by_hand(blobs, image, blocks):
    """A forward pass straight from the Caffe names, as Caffe's network is drawn."""
    function = nn.functional

    def affine(x, name):
        scale, shift = (torch.from_numpy(blobs[f"{name}_bn_{p}"]).view(1, -1, 1, 1) for p in "sb")
        return x * scale + shift

    def unit(x, name, stride, padding, norm=None):
        weight = torch.from_numpy(blobs[f"{name}_w"])
        return affine(function.conv2d(x, weight, stride=stride, padding=padding), norm or name)

    x = function.max_pool2d(unit(image, "conv1", 2, 3, "res_conv1").relu(), 3, 2, 1)
    for stage, count in enumerate(blocks):
        for block in range(count):
            name, stride = f"res{stage + 2}_{block}", 2 if stage and not block else 1
            y = unit(x, f"{name}_branch2a", stride, 0).relu()
            y = unit(unit(y, f"{name}_branch2b", 1, 1).relu(), f"{name}_branch2c", 1, 0)
            shortcut = x if block else unit(x, f"{name}_branch1", stride, 0)
            x = (y + shortcut).relu()
    return x


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))
    return str(path)


@pytest.mark.slow
def test_caffe_weights_give_caffes_features(tmp_path):
    blobs = caffe_blobs(R50)
    detector = small_detector(base=CAFFE, **FROZEN)
    detector.load_weights(write_pickle(tmp_path / "R-50.pkl", {"blobs": blobs}))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = detector.backbone.body(image)["3"]
        expected = caffe_by_hand(blobs, image, R50)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_caffe_convolution_bias_is_taken_over_by_the_norm(tmp_path):
    blobs = caffe_blobs(())
    blobs["conv1_b"] = np.linspace(-1, 1, 64, dtype=np.float32)
    state = read_caffe_resnet(Path(write_pickle(tmp_path / "R-50.pkl", blobs)))
    x = torch.randn(1, 64, 2, 2)
    norm = torchvision.ops.FrozenBatchNorm2d(64)
    norm.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("bn1.")})
    scale, shift = (torch.from_numpy(blobs[f"res_conv1_bn_{p}"]).view(1, -1, 1, 1) for p in "sb")
    bias = torch.from_numpy(blobs["conv1_b"]).view(1, -1, 1, 1)
    torch.testing.assert_close(norm(x), (x + bias) * scale + shift)


@pytest.mark.slow
def test_caffe_r101_fits(tmp_path):
    deep = detector_options(CAFFE, **FROZEN)
    detector = small_detector(base=deep, resnets={"depth": 101})
    detector.load_weights(write_pickle(tmp_path / "R-101.pkl", caffe_blobs(R101)))


class Command:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "written"
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps({"conv1_w": Command(target)}))
    with pytest.raises(WeightsError, match=r"open, but only NumPy arrays"):
        read_caffe_resnet(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no pickle", "is not a pickle of weights"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"res9_0_branch2a_w": np.zeros(1)}), "not a ResNet's"),
        (pickle.dumps({"conv1_w": "text"}), "not a ResNet's"),
        (pickle.dumps(collections.OrderedDict(a=1)), "collections.OrderedDict"),
    ],
)
def test_wrong_caffe_files_are_refused(tmp_path, content, match):
    file = tmp_path / "R-50.pkl"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=match):
        read_caffe_resnet(file)


def test_incomplete_caffe_file_names_what_is_missing(tmp_path):
    blobs = caffe_blobs((3,))
    detector = small_detector(base=CAFFE)
    with pytest.raises(WeightsError, match=r"missing: layer2\.0\.bn1\.bias, .* more\)$"):
        detector.load_weights(write_pickle(tmp_path / "R-50.pkl", blobs))


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"format": "RGB"}},
        {"pixels": {"pixel_std": [58.395, 57.12, 57.375]}},
        {"pixels": {"pixel_mean": [123.675, 116.28, 103.53]}},
        {"resnets": {"stride_in_1x1": False}},
    ],
)
def test_caffe_weights_need_caffes_input(tmp_path, change):
    detector = small_detector(base=CAFFE, **change)
    with pytest.raises(WeightsError, match=r"set INPUT\.FORMAT BGR"):
        detector.load_weights(write_pickle(tmp_path / "R-50.pkl", {}))


def test_imagenet_weights_fill_the_backbone(monkeypatch):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: resnet.state_dict())
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: resnet.state_dict()
    )
    detector = small_detector()
    detector.load_weights("imagenet")
    expected = {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}
    assert equal_states(dict(detector.backbone.body.state_dict()), expected)


def test_imagenet_weights_without_network_say_where_to_put_the_file(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=r"resnet18-\w+\.pth cannot be fetched .* put it into"):
        small_detector().load_weights("imagenet")


def test_imagenet_weights_need_their_input():
    with pytest.raises(WeightsError, match=r"set INPUT\.FORMAT RGB"):
        small_detector(image={"format": "BGR"}).load_weights("imagenet")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"student": small_detector(7).state_dict(), "teacher": state},
        lambda state: {"student": state, "teacher": None, "config": "TASK: detection"},
        lambda state: {
            "student": state,
            "teacher": small_detector(7).state_dict(),
            "inference_model": "student",
        },
        lambda state: {"trainer": {"models": {"student": state}, "iteration": 3}, "run": {}},
        lambda state: {"model": state},
    ],
)
def test_detector_files_are_found_inside_checkpoints(tmp_path, wrap):
    state = small_detector(1).state_dict()
    torch.save(wrap(state), tmp_path / "x.pth")
    detector = small_detector(2)
    detector.load_weights(str(tmp_path / "x.pth"))
    assert equal_states(detector.state_dict(), state)


def under(prefix, state):
    return {f"{prefix}{name}": x for name, x in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: under("module.", state),
        lambda state: {"model": under("module._orig_mod.", state), "args": Namespace(lr=0.1)},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"pytorch-lightning_version": "2", "state_dict": under("detector.", state)},
    ],
)
def test_detectors_of_other_trainers_are_unwrapped(tmp_path, wrap):
    state = small_detector(1).state_dict()
    torch.save(wrap(state), tmp_path / "x.pth")
    detector = small_detector(2)
    detector.load_weights(str(tmp_path / "x.pth"))
    assert equal_states(detector.state_dict(), state)


def test_a_backbone_of_another_trainer_is_unwrapped(tmp_path):
    resnet = torchvision.models.resnet18()
    torch.save({"state_dict": under("module.", resnet.state_dict())}, tmp_path / "x.pth")
    detector = small_detector()
    detector.load_weights(str(tmp_path / "x.pth"))
    assert torch.equal(detector.backbone.body.conv1.weight, resnet.conv1.weight)


def test_a_file_of_another_network_is_not_listed(tmp_path):
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, tmp_path / "x.pth")
    match = "is of another network: none of its 2 tensors, such as bias, is the model's"
    with pytest.raises(WeightsError, match=match) as error:
        small_detector().load_weights(str(tmp_path / "x.pth"))
    assert "more)" not in str(error.value)


def test_torchvision_resnet_file_fills_the_backbone(tmp_path):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    detector = small_detector(resnets={"norm": "FrozenBN"})
    detector.load_weights(str(tmp_path / "resnet18.pth"))
    assert torch.equal(detector.backbone.body.layer4[1].bn2.weight, resnet.layer4[1].bn2.weight)
    assert torch.equal(detector.backbone.body.conv1.weight, resnet.conv1.weight)


def test_stages_that_a_backbone_does_not_have_are_left_out_and_no_others(tmp_path):
    resnet, anchors = torchvision.models.resnet18(), {"sizes": [[8], [16], [32]]}
    torch.save(resnet.state_dict(), tmp_path / "x.pth")
    detector = small_detector(levels={"levels": [2, 3]}, anchor_generator=anchors)
    detector.load_weights(str(tmp_path / "x.pth"))
    assert equal_states(
        detector.backbone.body.state_dict(),
        {
            n: x
            for n, x in resnet.state_dict().items()
            if not n.startswith(("layer4", "layer3", "fc"))
        },
    )
    without = {n: x for n, x in resnet.state_dict().items() if not n.startswith("layer2")}
    torch.save(without, tmp_path / "y.pth")
    with pytest.raises(WeightsError, match="layer2"):
        detector.load_weights(str(tmp_path / "y.pth"))


def test_another_number_of_classes_is_explained(tmp_path):
    torch.save(small_detector(num_classes=80).state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="trained on 80 classes, the model has 3"):
        small_detector().load_weights(str(tmp_path / "x.pth"))


def test_whatever_does_not_fit_is_listed_and_nothing_is_changed():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    before = {name: x.clone() for name, x in module.state_dict().items()}
    state = {name: x + 1 for name, x in module.state_dict().items() if name.endswith("bias")}
    state |= {f"extra{i:02}": torch.zeros(1) for i in range(12)}
    state["0.bias"] = torch.zeros(3)
    state["1.bias"] = "text"
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, state, "file.pth")
    message = str(caught.value)
    assert "8 missing: 0.weight, 1.weight" in message
    assert "12 unknown: extra00" in message
    assert "extra09, ... (2 more)" in message
    assert "extra10" not in message
    assert "2 of another shape: 0.bias (3,) instead of (2,), 1.bias str instead of (2,)" in message
    assert "\n" not in message
    assert equal_states(dict(module.state_dict()), before)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a file of weights"),
        (b"garbage" * 100, "not a file of weights"),
        (None, "no such"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, content, match):
    file = tmp_path / "x.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as caught:
        small_detector().load_weights(str(file))
    assert "weights_only" not in str(caught.value)  # torch's advice to run the file's code


def test_a_file_without_a_state_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="no state dict but a list"):
        small_detector().load_weights(str(tmp_path / "x.pth"))


def test_a_torch_file_that_runs_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "written"
    torch.save({"conv1.weight": Command(target)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError):
        small_detector().load_weights(str(tmp_path / "x.pth"))
    assert not target.exists()


def test_frozen_random_weights_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger=base.__name__):
        small_detector().warn_if_frozen()
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger=base.__name__):
        small_detector(resnets={"norm": "FrozenBN"}, backbone={"freeze_at": 1}).warn_if_frozen()
    assert "1 tensors and 20 batch norms are frozen" in caplog.text


def test_weights_errors_are_user_errors():
    assert issubclass(WeightsError, UserError)


LITE = {
    "backbone": {"name": "timm:tf_efficientnet_lite0", "freeze_at": 6},
    "levels": {"levels": [3, 4, 5]},
    "pixels": {"pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD},
    "anchor_generator": {"sizes": [[16], [32], [64], [128]]},
}
PACKAGE = "package:efficientnet_lite0"


@pytest.fixture
def lite_weights(monkeypatch):
    """Random weights where the package's would be, by timm's names."""
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    monkeypatch.setattr(torchvision_detector, "read_package", lambda weights: state)
    return state


def test_weights_of_a_package_fill_the_body_and_leave_the_rest(lite_weights):
    detector, untouched = small_detector(**LITE), small_detector(**LITE)
    detector.load_weights(PACKAGE)
    body = detector.backbone.body.state_dict()
    assert all(x.equal(lite_weights[name]) for name, x in body.items())
    assert equal_states(detector.backbone.fpn.state_dict(), untouched.backbone.fpn.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"name": "resnet"}}, r"needs MODEL.BACKBONE.NAME timm:tf_eff.*not resnet"),
        ({"backbone": {"name": "timm:tf_efficientnet_lite1"}}, "needs MODEL.BACKBONE.NAME timm:tf"),
        ({"image": {"format": "BGR"}}, "needs INPUT.FORMAT RGB, not BGR"),
    ],
)
def test_a_package_needs_its_network_and_colors(change, message):
    options = {**LITE, **change}
    if "backbone" in change:
        options["backbone"] = {"freeze_at": 0, **change["backbone"]}
    with pytest.raises(WeightsError, match=message):
        small_detector(**options).load_weights(PACKAGE)


def test_a_package_with_other_pixels_is_loaded_and_said(lite_weights, caplog):
    small_detector(**{**LITE, "pixels": {}}).load_weights(PACKAGE)
    assert "was trained on (x - 127) / 128" in caplog.text


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_a_file_of_timms_network_fills_the_body(tmp_path, name):
    network = timm.create_model(name)
    torch.save(network.state_dict(), tmp_path / "network.pth")
    detector = small_detector(**{**LITE, "backbone": {"name": f"timm:{name}", "freeze_at": 1}})
    detector.load_weights(str(tmp_path / "network.pth"))
    theirs = {k.replace(".", "_"): x for k, x in network.state_dict().items()}
    body = detector.backbone.body.state_dict()
    assert all(x.equal(theirs[k.replace(".", "_")]) for k, x in body.items())


def test_a_file_of_another_network_of_timm_is_refused(tmp_path):
    torch.save(timm.create_model("tf_efficientnet_lite1").state_dict(), tmp_path / "network.pth")
    with pytest.raises(WeightsError, match="does not fit"):
        small_detector(**LITE).load_weights(str(tmp_path / "network.pth"))


def test_a_detector_on_timms_network_loads_itself(tmp_path):
    torch.save(small_detector(1, **LITE).state_dict(), tmp_path / "detector.pth")
    detector = small_detector(2, **LITE)
    detector.load_weights(str(tmp_path / "detector.pth"))
    assert equal_states(detector.state_dict(), small_detector(1, **LITE).state_dict())


@pytest.mark.parametrize("weights", ["imagenet", "R-50.pkl"])
def test_weights_of_resnets_are_refused_for_a_network_of_timm(weights):
    with pytest.raises(WeightsError, match="must be package:NAME, or a file"):
        small_detector(**LITE).load_weights(weights)


def test_what_is_frozen_in_a_network_of_timm_is_said(caplog):
    small_detector(**LITE).warn_if_frozen()
    assert "48 batch norms are frozen" in caplog.text
    assert "MODEL.BACKBONE.FREEZE_AT 0 MODEL.BACKBONE.NORM BN" in caplog.text
