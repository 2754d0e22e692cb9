"""Files of weights that other programs wrote."""

import argparse
import pathlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ssod_imwa.engine.checkpoint.foreign import plain_state, read_content
from ssod_imwa.errors import WeightsError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


class Lightning(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self):
        super().__init__()
        self.network = network()


STATE = network().state_dict()
PARALLEL = nn.DataParallel(network()).state_dict()
COMPILED = {f"_orig_mod.{name}": x for name, x in STATE.items()}
OPTIMIZER = torch.optim.AdamW(network().parameters()).state_dict()


def read(path, content):
    torch.save(content, path)
    return plain_state(read_content(path), "x.pth")


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        PARALLEL,
        COMPILED,
        {f"module.{name}": x for name, x in COMPILED.items()},
        {f"_orig_mod.{name}": x for name, x in PARALLEL.items()},
        {name.replace(".", "._orig_mod.", 1): x for name, x in STATE.items()},  # a compiled part
        {f"_fsdp_wrapped_module.{name}": x for name, x in STATE.items()},
        AveragedModel(network()).state_dict(),
        {"state_dict": PARALLEL, "epoch": 3, "optimizer": OPTIMIZER, "best_acc1": torch.ones(())},
        {"model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER, "loss": 0.5},
        {"model": STATE, "args": argparse.Namespace(lr=0.1, milestones=[2, 3]), "epoch": 9},
        {"net": STATE, "acc": 91.2},
        {"model": {"state_dict": COMPILED}},
        {"pytorch-lightning_version": "2.5", "state_dict": Lightning().state_dict(), "epoch": 1},
    ],
)
def test_what_trainers_and_wrappers_put_around_a_state_is_taken_away(tmp_path, content):
    state = read(tmp_path / "x.pth", content)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], x) for name, x in STATE.items())


def test_equal_layers_are_no_several_models(tmp_path):
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    assert read(tmp_path / "x.pth", state).keys() == state.keys()


def test_a_file_of_before_the_zip_format_is_read(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"state_dict": STATE}, file, _use_new_zipfile_serialization=False)
    assert plain_state(read_content(file), "x.pth").keys() == STATE.keys()


TWICE = {f"{who}.{i}": torch.ones(1) for who in ("modelTeacher", "modelStudent") for i in range(30)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": STATE, "state_dict_ema": STATE}, "several models: state_dict, state_dict_"),
        ({"model": TWICE}, "several models of one kind: modelTeacher, modelStudent"),
        (OPTIMIZER, "holds no state dict but an optimizer's state"),
        ({"epoch": 3, "lr": 0.1}, "holds no state dict but a dict of epoch, lr"),
        ({}, r"holds no state dict but \{\}"),
        ([1, 2], "holds no state dict but a list"),
        ({**STATE, "epoch": 3}, "more than tensors: epoch is a int"),
        (network(), "a whole pickled module, .*torch.save\\(model.state_dict"),
        (
            {"model": STATE, "args": argparse.Namespace(output=pathlib.Path("/x"))},
            "it holds pathlib.PosixPath, of which loading runs code",
        ),
        ({"model": STATE, "best": np.float64(1)}, "it holds numpy._core.multiarray.scalar, numpy"),
    ],
)
def test_what_cannot_be_taken_is_named_in_one_line(tmp_path, content, message):
    with pytest.raises(WeightsError, match=message) as caught:
        read(tmp_path / "x.pth", content)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to run the file's code
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x20\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"}}' + bytes(40), "a safetensors file"),
        (b"garbage" * 100, "not a file of weights"),
        (b"", "not a file of weights"),
    ],
)
def test_what_is_no_file_of_torch_is_named(tmp_path, start, message):
    (tmp_path / "x.pth").write_bytes(start)
    with pytest.raises(WeightsError, match=message):
        read_content(tmp_path / "x.pth")


def test_an_archive_of_torchscript_is_named(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="a TorchScript archive"):
        read_content(tmp_path / "x.pth")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(WeightsError, match="there is no such file"):
        read_content(tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_content(tmp_path)


class Command:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_nothing_of_a_file_is_run(tmp_path):
    target = tmp_path / "written"
    content = {"model": STATE, "args": argparse.Namespace(command=Command(target))}
    with pytest.raises(WeightsError, match=r"it holds .*open, of which loading runs code"):
        read(tmp_path / "x.pth", content)
    assert not target.exists()
