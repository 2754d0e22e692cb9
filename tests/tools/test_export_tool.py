import hashlib
from functools import partial

import pytest
import torch
from support import same
from torchvision.models.detection import FasterRCNN

from ssod_imwa.classification.networks import build_model
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT
from ssod_imwa.runs.config import load_config


def config():
    return load_config(
        overrides=[
            *("MODEL.RESNETS.DEPTH", "18"),
            *("MODEL.RESNETS.NORM", "BN"),
            *("MODEL.BACKBONE.FREEZE_AT", "0"),
            *("MODEL.FPN.OUT_CHANNELS", "8"),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
            *("INPUT.MIN_SIZE_TEST", "96"),
            *("INPUT.MAX_SIZE_TEST", "128"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "4"),
        ]
    )


def run_directory(folder, recommended):
    detectors = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        detectors[name] = build_detector(config(), num_classes=4)
    folder.mkdir()
    write_checkpoint(
        folder / "model_final.pth",
        {
            **{name: detector.state_dict() for name, detector in detectors.items()},
            "inference_model": recommended,
            "format": FORMAT,
            "config": config().dump(),
            "classes": ["ant", "bee", "cat", "dog"],
        },
    )
    return detectors[recommended]


@pytest.fixture
def export(call):
    return partial(call, "export")


@pytest.mark.parametrize("recommended", ["student", "teacher"])
def test_recommended_model_is_written_and_loads_as_printed(export, tmp_path, recommended):
    detector = run_directory(tmp_path / "run", recommended)
    output = tmp_path / "new folder" / "detector.pth"
    status, out, _ = export(tmp_path / "run", "--output", output)
    assert status == 0
    heading, digest, printed = out.split("\n", 2)
    assert f"the {recommended} of" in heading
    assert digest == f"sha256 {hashlib.sha256(output.read_bytes()).hexdigest()}"
    names = {}
    exec(printed, names)
    assert isinstance(names["model"], FasterRCNN)
    state = names["model"].state_dict()
    assert all(torch.equal(state[name], x) for name, x in detector.state_dict().items())
    assert names["model"].transform.min_size == (96,)
    assert names["classes"] == ["background", "ant", "bee", "cat", "dog"]
    assert names["input_size"] == {"min_size": 96, "max_size": 128}
    # It also starts a run of ours, as it did when it was a bare state dict.
    again = build_detector(config(), num_classes=4)
    again.load_weights(str(output))
    assert same(again.state_dict(), detector.state_dict())


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18"])
def test_a_classifier_is_loaded_by_the_printed_lines(export, tmp_path, name):
    cfg = load_config(overrides=["TASK", "classification", "CLS.MODEL.NAME", name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg, 3, weights="").eval()
    (tmp_path / "run").mkdir()
    content = {"student": model.state_dict(), "inference_model": "student", "config": cfg.dump()}
    content["classes"] = ["ant", "bee", "cat"]
    write_checkpoint(tmp_path / "run" / "model_final.pth", {**content, "format": FORMAT})
    status, out, error = export(tmp_path / "run", "--output", tmp_path / "classifier.pth")
    assert status == 0, error
    names = {}
    exec(out.split("\n", 2)[2], names)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(names["model"](images), model(images))
    assert ("ssod_imwa" in out) == (name == "cifar_resnet20")
    assert names["classes"] == ["ant", "bee", "cat"]
    assert names["size"] == cfg.CLS.INPUT.SIZE
    pixels = (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    for found, expected in zip((names["mean"], names["std"]), pixels, strict=True):
        assert found == pytest.approx([x / 255 for x in expected])


def test_the_trained_model_is_never_written_over(export, tmp_path):
    run_directory(tmp_path / "run", "teacher")
    file = tmp_path / "run" / "model_final.pth"
    before = file.read_bytes()
    status, _, error = export(tmp_path / "run", "--output", file)
    assert (status, "is there already" in error) == (2, True)
    assert file.read_bytes() == before


def test_unfinished_run_is_a_users_error(export, tmp_path):
    status, _, error = export(tmp_path, "--output", tmp_path / "x.pth")
    assert status == 2
    assert error.startswith("error: ")
    assert "holds neither model_final.pth nor model_averaged.pth" in error
    assert error.count("\n") == 1


def test_damaged_file_is_a_users_error(export, tmp_path):
    run_directory(tmp_path / "run", "teacher")
    file = tmp_path / "run" / "model_final.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, _, error = export(file, "--output", tmp_path / "x.pth")
    assert (status, "SHA-256" in error) == (2, True)
    assert not (tmp_path / "x.pth").exists()


def test_other_files_are_refused(export, tmp_path):
    source = tmp_path / "model_0000001.pth"
    write_checkpoint(source, {"trainer": {}})
    status, _, error = export(source, "--output", tmp_path / "x.pth")
    assert (status, "holds no averaged model" in error) == (2, True)
