import csv
import json
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resize

from ssod_imwa.analysis import prediction_files
from ssod_imwa.analysis.predicting import find_images
from ssod_imwa.classification.build import build_test_view
from ssod_imwa.classification.data.datasets import ClassificationDataset, read_into_memory
from ssod_imwa.classification.networks import build_model
from ssod_imwa.detection.data.coco import load_coco
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint
from ssod_imwa.engine.checkpoint.compatibility import FORMAT
from ssod_imwa.errors import DataError
from ssod_imwa.runs.config import load_config

SMALL_DETECTOR = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "INPUT.MIN_SIZE_TEST": 96,  # other than the images, so that boxes have to be moved back
}


def overrides(settings):
    return [str(x) for pair in settings.items() for x in pair]


def write_run(folder, cfg, model, classes, **content):
    folder.mkdir()
    write_checkpoint(
        folder / "model_final.pth",
        {
            "student": model.state_dict(),
            "inference_model": "student",
            "format": FORMAT,
            "config": cfg.dump(),
            "classes": classes,
            **content,
        },
    )
    return folder


@pytest.fixture(scope="module")
def detector_run(tmp_path_factory):
    cfg = load_config(overrides=overrides(SMALL_DETECTOR))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_detector(cfg, 2)
    folder = tmp_path_factory.mktemp("predict") / "run"
    return write_run(folder, cfg, model, ["dark", "bright"])


@pytest.fixture
def photos(tmp_path):
    """Three photographs, one of them below another folder, and what is no photograph."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/c.png"):
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture
def predict(call):
    return partial(call, "predict")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_detections_are_written_in_three_forms(predict, detector_run, photos, tmp_path):
    out = tmp_path / "out"
    status, said, error = predict(
        detector_run, photos, "--output", out, "--threshold", "0.1", "--device", "cpu"
    )
    assert status == 0, error
    table = rows(out / "detections.csv")
    assert table
    assert f"3 images, {len(table)} boxes" in said
    dataset = load_coco(out / "annotations.json", photos, name="predicted")
    assert dataset.classes == ("dark", "bright")
    names = ["a.png", "b.jpg", "more/c.png"]
    assert [record.file_name for record in dataset.records] == [str(photos / x) for x in names]
    boxes = np.concatenate([record.annotations.boxes for record in dataset.records])
    corners = [[float(row[x]) for x in ("x1", "y1", "x2", "y2")] for row in table]
    assert np.allclose(boxes, corners, atol=0.011)
    assert (boxes[:, 2] <= 64).all()
    assert (boxes[:, 3] <= 48).all()
    pictures = sorted(p.relative_to(out / "pictures") for p in (out / "pictures").rglob("*.jpg"))
    assert [str(p) for p in pictures] == ["a.png.jpg", "b.jpg", "more/c.png.jpg"]


def test_boxes_are_those_of_the_detector(predict, detector_run, photos, tmp_path):
    cfg = load_config(
        overrides=overrides({**SMALL_DETECTOR, "MODEL.WEIGHTS": detector_run / "model_final.pth"})
    )
    detector = build_detector(cfg, 2).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(photos / "a.png")).copy()).permute(2, 0, 1)
    (expected,) = detector.detect([resize(pixels, [96, 128], antialias=True)])
    predict(detector_run, photos / "a.png", "--output", tmp_path / "out", "--threshold", "0.1")
    table = rows(tmp_path / "out" / "detections.csv")
    sure = expected.scores > 0.1
    assert [float(row["score"]) for row in table] == pytest.approx(
        expected.scores[sure].tolist(), abs=1e-4
    )
    assert [float(row["x2"]) for row in table] == pytest.approx(
        (expected.boxes[sure, 2] / 2).tolist(), abs=0.02
    )


def test_the_batch_size_changes_nothing(predict, detector_run, photos, tmp_path):
    for size in ("1", "3"):
        threshold = ("--threshold", "0.1")
        predict(detector_run, photos, "--output", tmp_path / size, "--batch-size", size, *threshold)
    tables = [rows(tmp_path / size / "detections.csv") for size in ("1", "3")]
    for name in ("score", "x1", "y1", "x2", "y2"):
        one, three = ([float(row[name]) for row in table] for table in tables)
        assert one == pytest.approx(three, abs=0.02), name
    assert [row["file"] for row in tables[0]] == [row["file"] for row in tables[1]]
    assert len({row["file"] for row in tables[0]}) == 3


def test_images_that_cannot_be_read_are_named_and_left_out(predict, detector_run, photos, tmp_path):
    data = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(data[: len(data) // 2])
    out = tmp_path / "out"
    status, said, error = predict(detector_run, photos, "--output", out, "--no-pictures")
    assert status == 0
    assert "2 images" in said
    (line,) = [line for line in error.splitlines() if "left out" in line]
    assert "b.jpg" in line
    images = json.loads((out / "annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "more/c.png"]
    assert not (out / "pictures").exists()


def test_links_keep_their_names(predict, detector_run, photos, tmp_path):
    (photos / "z.png").symlink_to(photos / "more/c.png")
    (tmp_path / "elsewhere").mkdir()
    (photos / "b.jpg").rename(tmp_path / "elsewhere/1.jpg")
    (photos / "b.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    predict(detector_run, photos, "--output", tmp_path / "out", "--no-pictures")
    images = json.loads((tmp_path / "out/annotations.json").read_text())["images"]
    assert sorted(x["file_name"] for x in images) == ["a.png", "b.jpg", "more/c.png", "z.png"]


def test_links_that_lead_nowhere_are_named(predict, detector_run, photos, tmp_path):
    for path in photos.rglob("*.*g"):
        path.unlink()
        path.symlink_to(tmp_path / "gone" / path.name)
    a, b = photos / "a.png", photos / "b.jpg"
    for sources in ([photos], [a, b]):
        status, _, error = predict(detector_run, *sources, "--output", tmp_path / "out")
        (line,) = error.splitlines()
        assert status == 2
        assert f"image {a} is a link to {tmp_path}/gone/a.png, which does not exist" in line
    Image.new("RGB", (64, 48)).save(photos / "whole.png")
    status, said, error = predict(detector_run, photos, "--output", tmp_path / "out")
    assert (status, "1 images" in said) == (0, True)
    left_out = [line.partition("left out: image ")[2].split()[0] for line in error.splitlines()]
    assert left_out == [str(a), str(b), str(photos / "more/c.png")]


def test_an_image_that_is_named_in_two_ways_counts_once(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert len(find_images([".", photos])) == len(find_images(["."]))


@pytest.mark.parametrize("error", [DataError("full"), ZeroDivisionError()])
def test_a_failure_on_the_way_leaves_no_folder(predict, detector_run, photos, tmp_path, error):
    def fail(*arguments, **options):
        raise error

    out = tmp_path / "new" / "out"
    with pytest.MonkeyPatch.context() as patch, suppress(ZeroDivisionError):
        patch.setattr(prediction_files, "draw_detections", fail)
        predict(detector_run, photos, "--output", out)
    assert not out.parent.exists()


@pytest.mark.parametrize("experts", [1, 2])
def test_a_classifier_writes_probabilities(predict, tmp_path, photos, experts):
    settings = {
        "TASK": "classification",
        "CLS.MODEL.NAME": "cifar_resnet20",
        "DATASETS.TRAIN": ["long_tailed_digits"],
        "CLS.ALGORITHM": "erm" if experts == 1 else "ncl",
    }
    cfg = load_config(overrides=overrides(settings))
    model = build_model(cfg, 3, weights="").eval()
    run = write_run(tmp_path / "run", cfg, model, ["x", "y", "z"])
    for name in ("a.png", "b.jpg", "more/c.png"):
        with Image.open(photos / name) as image:
            image.resize((32, 32)).save(photos / name)
    Image.new("RGB", (40, 32)).save(photos / "wide.png")
    status, _, error = predict(run, photos, "--output", tmp_path / "out", "--threshold", "0.5")
    assert (status, "is a classifier: --threshold" in error) == (2, True)
    status, said, error = predict(run, photos, "--output", tmp_path / "out")
    assert status == 0, error
    assert "wide.png is 40 x 32 pixels (must be 32 x 32" in error
    table = rows(tmp_path / "out" / "classes.csv")
    assert [row["file"] for row in table] == ["a.png", "b.jpg", "more/c.png"]
    for row in table:
        values = {name: float(row[f"p({name})"]) for name in "xyz"}
        assert sum(values.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(values, key=values.get)
        assert float(row["probability"]) == max(values.values())
    assert "3 images" in said


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(
    ("train", "content", "pixels"),
    [
        ("mine", {"stored_size": None}, None),  # a set of files that `register_images` made known
        ("folder:x", {"stored_size": 48}, 48),  # tested on a set in memory
        ("stl10_train", {"stored_size": 96}, 96),
        ("imagenet_lt_train", {}, None),  # older files, which do not say it
        ("list:x.txt:y", {}, None),
        ("cifar10_train", {}, 32),
    ],
)
def test_images_are_seen_as_the_test_images_were(
    call, predict, tmp_path, photos, train, content, pixels, exported
):
    settings = {"TASK": "classification", "DATASETS.TRAIN": [train], "CLS.INPUT.SIZE": 32}
    cfg = load_config(overrides=overrides({**settings, "CLS.MODEL.NAME": "cifar_resnet20"}))
    model = build_model(cfg, 3, weights="").eval()
    source = write_run(tmp_path / "run", cfg, model, ["x", "y", "z"], **content)
    if exported:
        assert call("export", source, "--output", tmp_path / "exported.pth")[0] == 0
        source = tmp_path / "exported.pth"
    if pixels is not None:
        with Image.open(photos / "a.png") as image:
            image.resize((pixels, pixels)).save(photos / "a.png")
    status, said, error = predict(source, photos, "--output", tmp_path / "out")
    assert status == 0, error
    if pixels is None:
        assert "3 images" in said
        return
    assert "1 images" in said
    assert f"is 64 x 48 pixels (must be {pixels} x {pixels}" in error
    dataset = read_into_memory(
        ClassificationDataset("x", torch.zeros(1).long(), ("x",), files=(str(photos / "a.png"),))
    )
    view = build_test_view(cfg, dataset)
    with torch.no_grad():
        expected = model(view(dataset.images, torch.empty(1, 0))).softmax(-1)[0]
    (row,) = rows(tmp_path / "out" / "classes.csv")
    found = [float(row[f"p({name})"]) for name in "xyz"]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("pixels", ["RGB", "BGR"])
def test_an_exported_detector_finds_the_same(call, predict, photos, tmp_path, pixels):
    cfg = load_config(overrides=overrides({**SMALL_DETECTOR, "INPUT.FORMAT": pixels}))
    run = write_run(tmp_path / "run", cfg, build_detector(cfg, 2), ["dark", "bright"])
    assert call("export", run, "--output", tmp_path / "exported.pth")[0] == 0
    tables = []
    for model in (run, tmp_path / "exported.pth"):
        out = tmp_path / f"of_{model.name}"
        status, _, error = predict(model, photos, "--output", out, "--threshold", "0.2")
        assert status == 0, error
        tables.append(list(csv.reader((out / "detections.csv").open())))
    assert len(tables[0]) == len(tables[1]) > 1
    for one, other in zip(*(table[1:] for table in tables), strict=True):
        assert one[:2] == other[:2]
        # Written with 4 and 2 digits, of channels that are summed in another order.
        assert float(one[2]) == pytest.approx(float(other[2]), abs=2e-4)
        assert list(map(float, one[3:])) == pytest.approx(list(map(float, other[3:])), abs=0.02)


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18"])
def test_an_exported_classifier_says_the_same(call, predict, photos, tmp_path, name):
    settings = {"TASK": "classification", "CLS.MODEL.NAME": name, "CLS.INPUT.SIZE": 32}
    cfg = load_config(overrides=overrides({**settings, "DATASETS.TRAIN": ["folder:x"]}))
    model = build_model(cfg, 3, weights="").eval()
    run = write_run(tmp_path / "run", cfg, model, ["x", "y", "z"])
    assert call("export", run, "--output", tmp_path / "exported.pth")[0] == 0
    tables = []
    for source in (run, tmp_path / "exported.pth"):
        out = tmp_path / f"of_{source.name}"
        status, _, error = predict(source, photos, "--output", out)
        assert status == 0, error
        tables.append((out / "classes.csv").read_text())
    assert tables[0] == tables[1]


def test_mistakes_are_one_line_and_nothing_is_overwritten(predict, detector_run, photos, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, message in (
        ((detector_run, tmp_path / "none", "--output", out), "none does not exist"),
        ((detector_run, tmp_path / "empty", "--output", out), "no image is there"),
        ((detector_run, photos, "--output", full), "is there already"),
        ((tmp_path / "none", photos, "--output", out), "none"),
        ((detector_run, photos / "notes.txt", "--output", out), "none of 1 images can be read"),
        ((detector_run, photos, "--output", out, "--device", "tpu"), "tpu"),
    ):
        status, _, error = predict(*arguments)
        assert status == 2
        assert message in error.splitlines()[-1]
        assert not out.exists()
    assert predict(detector_run, photos, "--output", out, "--batch-size", "0")[0] == 2
    assert predict(detector_run, photos, "--output", out, "--threshold", "nan")[0] == 2
