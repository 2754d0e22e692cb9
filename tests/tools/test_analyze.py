import ast
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import in_one_thread

from ssod_imwa.analysis import commands, unlabeled_totals, weight_commands
from ssod_imwa.analysis.subjects import SUBJECTS
from ssod_imwa.runs import run as runs
from ssod_imwa.runs.config import load_config

RECIPES = Path(__file__).parents[2] / "configs/digit_images_semi"


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
        modules = (commands, weight_commands, unlabeled_totals)
        assert sum(callable(getattr(module, subject, None)) for module in modules) == 1
        status, out, _ = analyze(subject, "--help")
        assert status == 0
        assert "OUTPUT_DIR of a run" in out
        assert "--output DIR" in out


def test_mistakes_are_one_line_and_status_2(analyze, tmp_path):
    status, _, error = analyze("calibration", tmp_path / "nowhere")
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    _, _, error = analyze("tau", tmp_path, "--opts", "MODEL.WEIGHTS", "x.pth")
    assert error == "error: --opts MODEL.WEIGHTS is not read here (give --weights)\n"
    for snapshots in (("members", tmp_path), ("totals", tmp_path, "--unlabeled", "x")):
        assert "unrecognized arguments: --weights" in analyze(*snapshots, "--weights", "x")[2]
        _, _, error = analyze(*snapshots, "--opts", "MODEL.WEIGHTS", "x.pth")
        assert error == "error: --opts MODEL.WEIGHTS is not read here (give another RUN)\n"
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


@pytest.fixture(scope="module")
def labeled_alone(tmp_path_factory):
    """Labeled digits with snapshots and held-out images."""
    folder = tmp_path_factory.mktemp("estimate") / "run"
    settings = ["OUTPUT_DIR", str(folder)]  # with as many snapshots as the recipe keeps
    assert runs.train(load_config(RECIPES / "darp_estimate.yaml", settings)) == 0
    return folder


@pytest.mark.slow
def test_totals_are_near_the_truth_whatever_its_shape(analyze, labeled_alone, tmp_path):
    """And far from the labeled shares, which DARP would take without them."""
    for shape, counts in (("consistent", [110, 22]), ("reversed", [22, 110])):
        fragment = tmp_path / f"{shape}.yaml"
        fragment.write_text(f"CLS: {{UNLABELED: {{SHAPE: {shape}}}}}")
        files = [RECIPES / "darp.yaml", RECIPES / "hold_out.yaml", fragment]
        status, out, error = analyze("totals", labeled_alone, "--unlabeled", *files)
        assert (status, error) == (0, "")
        totals = ast.literal_eval(re.search(r'TOTALS\s+"(\[.*?\])"', out, re.DOTALL)[1])
        assert len(totals) == 10
        head, tail = sum(totals[:3]), sum(totals[-3:])
        assert (head > tail) == (counts[0] > counts[1])
        assert abs(sum(totals) - 554) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unlabeled", RECIPES / "darp.yaml"], "CLS.IMBALANCE of"),
        (
            ["--unlabeled", RECIPES / "supervised.yaml", RECIPES / "hold_out.yaml"],
            "reads no unlabeled images",
        ),
        (
            ["--unlabeled", RECIPES / "darp.yaml", RECIPES / "hold_out.yaml", "--per-class", 11],
            "--per-class = 11 is not allowed (must be 1..10",
        ),
    ],
)
@pytest.mark.slow
def test_totals_refuse_images_of_another_split(analyze, labeled_alone, options, message):
    status, _, error = analyze("totals", labeled_alone, *options)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_totals_need_snapshots_and_held_out_images(analyze, trained, tmp_path):
    status, _, error = analyze("totals", trained, "--unlabeled", RECIPES / "darp.yaml")
    assert (status, "CLS.IMBALANCE.HOLD_OUT = 0 is not allowed" in error) == (2, True)
