import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.runs.config import load_config

IMAGES = 6


def write_dataset(root):
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, IMAGES + 1):
        pixels = rng.integers(90, 160, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        box = {"bbox": [5, 5, 20, 16], "area": 320, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": i % 2 + 1, **box})
    categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "all.json").write_text(json.dumps(content))


SETTINGS = {
    "OUTPUT_DIR": "somewhere/else",
    "DATASETS.TRAIN": ["coco:all.json:images"],
    "DATASETS.TEST": ["coco:all.json:images"],
    "DATASETS.SPLIT.PERCENT": 50,
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "INPUT.MIN_SIZE_TRAIN": [48],
    "INPUT.MIN_SIZE_TEST": 48,
    "SSOD.ALGORITHM": "unbiased_teacher",
    "SSOD.BBOX_THRESHOLD": 0.2,
}
OF_TWO_STAGES = ("MODEL.ROI_BOX_HEAD.FC_DIM", "MODEL.RPN.PRE_NMS_TOPK_TEST")


def config_of(root, settings):
    pairs = {"DATASETS.ROOT": root, **settings}.items()
    return load_config(overrides=[str(x) for pair in pairs for x in pair])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run as training leaves it, with random weights."""
    root = tmp_path_factory.mktemp("visualize")
    write_dataset(root)
    cfg = config_of(root, SETTINGS)
    run_dir = root / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(cfg.dump())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = build_detector(cfg, 2).state_dict()
    torch.save({"student": state, "teacher": state}, run_dir / "model_averaged.pth")
    return run_dir


@pytest.fixture
def visualize(call):
    return partial(call, "visualize")


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_shows_detections_of_the_newest_model_beside_the_truth(visualize, run_dir):
    status, out, _ = visualize(run_dir, "--images", "2", "--threshold", "0")
    assert status == 0
    assert out.split() == [str(run_dir / "pictures" / "predictions.png")]
    sheet = picture(run_dir / "pictures" / "predictions.png")
    visualize(run_dir, "--images", "2", "--threshold", "1")
    nothing = picture(run_dir / "pictures" / "predictions.png")
    assert sheet.shape == nothing.shape
    half = sheet.shape[1] // 2
    assert (sheet[:, :half] == nothing[:, :half]).all()  # the truth is the same
    assert (sheet[:, half:] != nothing[:, half:]).any()


def test_the_number_of_images_makes_the_sheet_longer(visualize, run_dir, tmp_path):
    heights = []
    for count in (1, 2):
        visualize(run_dir, "--images", count, "--output", tmp_path)
        heights.append(len(picture(tmp_path / "predictions.png")))
    assert heights[0] < heights[1]


def test_shows_views_of_labeled_and_unlabeled_images(visualize, run_dir, tmp_path):
    status, out, _ = visualize(run_dir, "--views", "--images", "2", "--output", tmp_path)
    assert status == 0
    assert out.split() == [str(tmp_path / x) for x in ("labeled_views.png", "pseudo_labels.png")]
    sheet = picture(tmp_path / "labeled_views.png")
    half = sheet.shape[1] // 2
    assert (sheet[40:, :half] != sheet[40:, -half:]).any()  # weak and strong differ
    visualize(run_dir, "--views", "--images", "2", "--output", tmp_path / "again")
    assert (picture(tmp_path / "again" / "labeled_views.png") == sheet).all()


def test_shows_what_a_dense_teacher_teaches(visualize, run_dir, tmp_path):
    changes = {
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.FPN.OUT_CHANNELS": 64,
        "MODEL.FCOS.NUM_CONVS": 1,
        "MODEL.FCOS.PRIOR_PROB": 0.6,  # all locations are sure
        "SSOD.ALGORITHM": "dense_teacher",
        "SSOD.REGION_RATIO": 0.2,
    }
    settings = {k: x for k, x in SETTINGS.items() if k not in OF_TWO_STAGES} | changes
    del settings["SSOD.BBOX_THRESHOLD"]
    cfg = config_of(run_dir.parent, settings)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save(build_detector(cfg, 2).state_dict(), tmp_path / "model.pth")
    weights = ("--config-file", tmp_path / "config.yaml", "--weights", tmp_path / "model.pth")
    status, out, _ = visualize(*weights, "--views", "--images", "2", "--output", tmp_path)
    assert status == 0
    assert out.split() == [str(tmp_path / x) for x in ("labeled_views.png", "pseudo_labels.png")]


def test_labels_are_shown_before_anything_is_trained(visualize, run_dir, tmp_path):
    arguments = ("--config-file", run_dir / "config.yaml", "--output", tmp_path / "before")
    status, out, _ = visualize(*arguments, "--views", "--images", "2")
    assert (status, out.split()) == (0, [str(tmp_path / "before" / "labeled_views.png")])
    visualize(run_dir, "--views", "--images", "2", "--output", tmp_path / "after")
    before, after = (picture(tmp_path / x / "labeled_views.png") for x in ("before", "after"))
    assert (before == after).all()
    assert visualize(*arguments)[0] == 2  # detections need weights


def test_supervised_training_has_no_pseudo_labels(visualize, run_dir, tmp_path):
    settings = {**SETTINGS, "SSOD.ALGORITHM": "supervised"}
    del settings["SSOD.BBOX_THRESHOLD"]
    (tmp_path / "supervised.yaml").write_text(config_of(run_dir.parent, settings).dump())
    _, out, _ = visualize(
        run_dir, "--views", "--output", tmp_path, "--config-file", tmp_path / "supervised.yaml"
    )
    assert out.split() == [str(tmp_path / "labeled_views.png")]


def test_other_weights_and_configuration(visualize, run_dir, tmp_path):
    status, _, error = visualize(
        "--config-file",
        run_dir / "config.yaml",
        "--weights",
        run_dir / "model_averaged.pth",
        "--output",
        tmp_path,
        "--images",
        "1",
    )
    assert (status, error) == (0, "")
    assert (tmp_path / "predictions.png").exists()


def test_mistakes_are_one_line_and_status_2(visualize, run_dir, tmp_path):
    for arguments, message in (
        ((tmp_path,), "config.yaml"),
        ((run_dir, "--dataset", "coco:none.json:images"), "none.json"),
        ((run_dir, "--weights", tmp_path / "none.pth"), "none.pth"),
        ((run_dir, "--opts", "SSOD.BOX", "1"), "SSOD.BOX"),
    ):
        status, _, error = visualize(*arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert message in error
    assert visualize()[0] == 2
    assert visualize(run_dir, "--images", "0")[0] == 2


def test_settings_that_are_misplaced_or_would_change_nothing_are_refused(visualize, run_dir):
    recipe = ("--config-file", run_dir / "config.yaml", "SEED", 3, "--output", "out", "--views")
    for arguments, message in (
        ((run_dir, "SEED", 3), "unrecognized arguments: SEED 3 (settings follow --opts)"),
        ((*recipe, "TEST.IMS_PER_BATCH", 3), "arguments: 3 (settings follow --opts)"),
        (("--opts", "SEED", 3, run_dir), "/run' stands alone (RUN_DIR comes before --opts)"),
        ((*recipe, "--opts", "SEED", 4), "SEED is set twice, after --config-file and --opts"),
        ((*recipe, "--opts", "seed", 4), "command line: seed is not a configuration key"),
        ((run_dir, "--opts", "OUTPUT_DIR", "x"), "(give the folder of another run, or --output)"),
        ((run_dir, "--opts", "MODEL.WEIGHTS", "x"), "is not read here (give --weights)"),
        ((run_dir, "--views", "--dataset", "x"), "--dataset is not read with --views"),
    ):
        status, _, error = visualize(*arguments)
        assert (status, message in error.splitlines()[-1]) == (2, True), error


@pytest.mark.parametrize("threshold", ["3", "-0.1", "nan"])
def test_a_threshold_that_is_no_score_is_refused(visualize, threshold):
    status, _, error = visualize("run", f"--threshold={threshold}")
    assert (status, f"--threshold = {threshold} is not allowed" in error) == (2, True)


def test_a_run_of_classification_is_sent_to_the_other_tool(visualize, tmp_path):
    (tmp_path / "config.yaml").write_text("TASK: classification\n")
    status, printed, error = visualize(tmp_path)
    assert (status, printed) == (2, "")
    assert error == (
        f"error: {tmp_path} is of classification (must be of detection, or --views; "
        "tools/analyze.py draws classifiers)\n"
    )


SEMI_SUPERVISED = (
    *("CLS.ALGORITHM", "fixmatch", "CLS.INPUT.VIEWS", "['weak']", "CLS.IMBALANCE.MAXIMUM", "20"),
    *("CLS.UNLABELED.MAXIMUM", "40", "MODEL.DEVICE", "cpu", "CLS.MODEL.NAME", "cifar_resnet20"),
)


def test_weak_and_strong_views_of_a_classifier_stand_side_by_side(call, tmp_path):
    recipe = ("--config-file", "configs/digit_images/base.yaml", "--opts", *SEMI_SUPERVISED)
    command = ("--views", "--output", tmp_path, "--images", 3)
    status, out, _ = call("visualize", *command, *recipe)
    assert status == 0
    names = ["labeled_views.png", "unlabeled_views.png"]
    assert out.splitlines() == [str(tmp_path / name) for name in names]
    labeled, unlabeled = (np.asarray(Image.open(tmp_path / name)) for name in names)
    assert unlabeled.shape[1] * unlabeled.shape[0] > 1.7 * labeled.shape[1] * labeled.shape[0]
    gray = (unlabeled == 127).all(-1).mean()
    assert 0.03 < gray < 0.3  # the squares of the strong views
    assert (labeled == 127).all(-1).mean() < 0.01
