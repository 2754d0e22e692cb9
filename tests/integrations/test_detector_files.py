"""What goes into and comes out of detectron2's detectors: weights, exports, refused keys."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2_toys import CLASSES, DENSE, config, images

from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.errors import ConfigError, UserError, WeightsError

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("project")]

ABOUT = {"classes": ["a", "b", "c"]}


def test_an_exported_detector_is_loaded_by_detectron2_alone(tmp_path, monkeypatch):
    detector = build_detector(config(), CLASSES)
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
    monkeypatch.chdir(tmp_path)
    file = Path("detector.pth")
    code = detector.export(file, min_size=64, max_size=96, about=ABOUT)
    with pytest.raises(UserError, match=r"detector.yaml is there already"):
        detector.export(file, min_size=64, max_size=96, about=ABOUT)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = {}
    exec(code, names)
    image = images()[0]
    instances = names["predictor"](image.flip(0).permute(1, 2, 0).numpy())["instances"]
    found = detector.detect([image])[0]
    assert len(found) > 0
    torch.testing.assert_close(instances.pred_boxes.tensor, found.boxes)
    torch.testing.assert_close(instances.scores, found.scores)
    assert names["classes"] == ["a", "b", "c"]
    assert names["input_size"] == {"min_size": 64, "max_size": 96}


def test_an_exported_configuration_is_of_no_machine(tmp_path, monkeypatch):
    from detectron2.config import get_cfg

    monkeypatch.chdir(tmp_path)
    build_detector(config(), CLASSES).export(
        Path("detector.pth"), min_size=64, max_size=96, about=ABOUT
    )
    settings = yaml.safe_load((tmp_path / "detector.yaml").read_text())
    assert "DEVICE" not in settings["MODEL"]
    assert settings["MODEL"]["WEIGHTS"] == str(tmp_path / "detector.pth")
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "detector.yaml"))
    assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE


def test_an_exported_lazy_detector_is_loaded_by_detectron2_alone(tmp_path, monkeypatch):
    detector = build_detector(config(detector=DENSE[1]), CLASSES)
    monkeypatch.chdir(tmp_path)
    code = detector.export(Path("detector.pth"), min_size=64, max_size=96, about=ABOUT)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = {}
    exec(code, names)
    state = names["model"].state_dict()
    assert all(torch.equal(state[n], x) for n, x in detector.model.state_dict().items())
    assert names["classes"] == ["a", "b", "c"]
    assert names["input_size"] == {"min_size": 64, "max_size": 96}


def test_advice_about_frozen_random_weights_acts(tmp_path, caplog):
    """FCOS takes none of our keys: what the warning names is followed to the letter."""
    build_detector(config(detector=DENSE[1]), CLASSES).warn_if_frozen()
    warning = caplog.messages[-1]
    assert "53 batch norms are frozen" in warning
    assert "MODEL.RESNETS" not in warning
    for setting in ("freeze_at = 0", 'stem.norm = stages.norm = "BN"', "model.backbone.bottom_up"):
        assert setting in warning
    (tmp_path / "fcos.py").write_text(documented("my_project/fcos.py"))
    caplog.clear()
    build_detector(config(detector=str(tmp_path / "fcos.py")), CLASSES).warn_if_frozen()
    assert not caplog.messages

    build_detector(config(**{"MODEL.RESNETS.NORM": "FrozenBN"}), CLASSES).warn_if_frozen()
    assert "MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN" in caplog.messages[-1]


def documented(name):
    """The Python file of docs/detectron2.md that begins with its name."""
    page = (Path(__file__).parents[2] / "docs" / "detectron2.md").read_text()
    return next(
        block for block in page.split("```python\n") if block.startswith(f"# {name}\n")
    ).split("```")[0]


def test_weights_come_from_our_files_and_from_theirs(tmp_path):
    trained, ours, theirs = (build_detector(config(), CLASSES) for _ in range(3))
    write_checkpoint(
        tmp_path / "ours.pth", {"student": trained.state_dict(), "inference_model": "student"}
    )
    torch.save({"model": trained.model.state_dict()}, tmp_path / "theirs.pth")
    ours.load_weights(str(tmp_path / "ours.pth"))
    theirs.load_weights(str(tmp_path / "theirs.pth"))
    for detector in (ours, theirs):
        state = detector.state_dict()
        assert all(torch.equal(state[n], x) for n, x in trained.state_dict().items())


def test_weights_of_other_trainers_are_unwrapped(tmp_path):
    trained, detector = (build_detector(config(), CLASSES) for _ in range(2))
    state = {f"module.{name}": x for name, x in trained.model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pth")
    detector.load_weights(str(tmp_path / "x.pth"))
    state = detector.state_dict()
    assert all(torch.equal(state[n], x) for n, x in trained.state_dict().items())
    torch.save(trained, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match=r"whole\.pth: is a whole pickled module"):
        detector.load_weights(str(tmp_path / "whole.pth"))


def test_wrong_weights_and_detectors_are_one_line(tmp_path):
    torch.save({"model": {"other.weight": torch.ones(2)}}, tmp_path / "other.pth")
    detector = build_detector(config(), CLASSES)
    with pytest.raises(WeightsError, match="nothing in it fits the model"):
        detector.load_weights(str(tmp_path / "other.pth"))
    with pytest.raises(WeightsError, match=r"missing.pth.* cannot be loaded"):
        detector.load_weights(str(tmp_path / "missing.pth"))
    with pytest.raises(ConfigError, match="must be a file, or one of detectron2's model zoo"):
        config(detector="COCO-Detection/faster.yaml")
    with pytest.raises(ConfigError, match="USE_SIGMOID_CE True is not allowed"):
        build_detector(config(**{"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}), CLASSES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.BACKBONE.NAME", "timm:resnet18"),
        ("MODEL.WEIGHTS", "package:efficientnet_lite0"),
    ],
)
def test_what_torchvisions_detectors_alone_take_is_refused_by_name(key, value):
    cfg = config().clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=rf"{key} = '{value}' is not allowed with MODEL.TOOLKIT"):
        build_detector(cfg, CLASSES)
