from functools import partial

import numpy as np
import pytest
from PIL import Image
from support import in_one_thread

from ssod_imwa.analysis import commands, weight_commands
from ssod_imwa.analysis.subjects import SUBJECTS
from ssod_imwa.runs import run as runs
from ssod_imwa.runs.config import load_config


@pytest.fixture
def analyze(call):
    return partial(call, "analyze")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with in_one_thread():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Digits for a few steps, two members with snapshots, curves of classes."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    settings = {
        "TASK": "classification",
        "OUTPUT_DIR": folder,
        "DATASETS.TRAIN": ["digit_images_train"],
        "DATASETS.TEST": ["digit_images_test"],
        "CLS.MODEL.NAME": "cifar_resnet20",
        "CLS.IMBALANCE.RATIO": 20,
        "CLS.TRACK_PERIOD": 2,
        "CLS.SNAPSHOT_PERIOD": 2,
        "IMWA.MEMBERS": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.IMS_PER_BATCH": 8,
        "TEST.IMS_PER_BATCH": 364,
    }
    pairs = [str(x) for pair in settings.items() for x in pair]
    assert runs.train(load_config(overrides=pairs)) == 0
    return folder


def test_every_subject_has_a_function_and_says_what_is_seen(analyze):
    for subject in SUBJECTS:
        assert callable(getattr(commands, subject, None) or getattr(weight_commands, subject))
        status, out, _ = analyze(subject, "--help")
        assert status == 0
        assert "OUTPUT_DIR of a run" in out
        assert "--output DIR" in out


def test_mistakes_are_one_line_and_status_2(analyze, tmp_path):
    status, _, error = analyze("calibration", tmp_path / "nowhere")
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert analyze("unknown", tmp_path)[0] == 2
    assert analyze()[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "pictures", "said"),
    [
        (("calibration", "--bins", 5), ["calibration.png"], "5 bins"),
        (("confusion",), ["confusion.png"], "predicted as"),
        (("classes",), ["recall.png", "class_curves.png"], "classes with recall 0"),
        (("features", "--group", "layer1"), ["features.png"], "deviation"),
        (
            ("landscape", "--directions", 1, "--points", 3, "--images", 20),
            ["landscape.png"],
            "mean of the directions (1)",
        ),
        (
            ("landscape", "--plane", "--points", 3, "--images", 20),
            ["landscape_plane.png"],
            "diagonal",
        ),
        (("members",), ["members.png"], "gain over the best"),
        (("embedding", "--images", 3, "--classes", 4), ["embedding.png"], "test images"),
        (("tau",), ["tau.png"], "nearest class mean"),
    ],
    ids=[
        *("calibration", "confusion", "classes", "features", "landscape", "plane", "members"),
        *("embedding", "tau"),
    ],
)
def test_a_subject_draws_pictures_and_prints_numbers(
    analyze, trained, tmp_path, arguments, pictures, said
):
    subject, *options = arguments
    status, out, error = analyze(subject, trained, *options, "--output", tmp_path)
    assert (status, error) == (0, "")
    assert said in out
    assert out.split()[-len(pictures) :] == [str(tmp_path / name) for name in pictures]
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image).std() > 0  # something is drawn


@pytest.mark.slow
def test_the_line_from_a_run_to_itself_is_flat_and_goes_to_the_runs_pictures(analyze, trained):
    status, out, _ = analyze("interpolate", trained, trained / "model_final.pth", "--points", 2)
    assert status == 0
    first, last = ([x.strip() for x in line.split("│")] for line in out.splitlines()[-4:-2])
    assert first[2:] == last[2:]
    assert (trained / "pictures" / "interpolation.png").exists()


@pytest.mark.slow
def test_a_run_without_experts_says_so(analyze, trained):
    status, _, error = analyze("experts", trained)
    assert (status, "experts need CLS.MODEL.EXPERTS" in error) == (2, True)
