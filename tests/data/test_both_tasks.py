"""The same wrong inputs for detection and classification: what both can meet, both answer alike."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data import validation as classification
from ssod_imwa.classification.data.catalog import image_fingerprint, load_images, load_unlabeled
from ssod_imwa.classification.data.datasets import dataset_of_files
from ssod_imwa.classification.data.reports import check_images
from ssod_imwa.detection.data import validation as detection
from ssod_imwa.detection.data.catalog import fingerprint, load_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.reports import check_dataset
from ssod_imwa.errors import DataError, UserError
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.open import open_task

TASKS = {
    "detection": SimpleNamespace(
        name="coco:train.json:train",
        load=load_dataset,
        check=check_dataset,
        check_readable=detection.check_readable,
    ),
    "classification": SimpleNamespace(
        name="folder:train",
        load=load_images,
        check=check_images,
        check_readable=classification.check_readable,
    ),
}
VICTIM = "train/dog/1.png"


@pytest.fixture(params=TASKS)
def task(request, tmp_path):
    """Four training and two test images of a cat and a dog each, as both tasks read them."""
    for split, count in (("train", 4), ("test", 2)):
        images, boxes = [], []
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                file = tmp_path / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((32, 32), 50 + len(images)).convert("RGB").save(file)
                entry = {"id": len(images), "file_name": f"{name}/{i}.png"}
                images.append({**entry, "width": 32, "height": 32})
                box = {"image_id": entry["id"], "category_id": label, "bbox": [4, 4, 20, 20]}
                boxes.append({"id": len(boxes), **box})
        categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return SimpleNamespace(kind=request.param, root=tmp_path, **vars(TASKS[request.param]))


def config(task, *overrides):
    """A run of the task that reads each of the eight training images more than once."""
    settings = {"DATASETS.ROOT": task.root, "DATALOADER.NUM_WORKERS": 0, "TASK": task.kind}
    settings |= {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 12, "SOLVER.WARMUP_ITERS": 1}
    test = task.name.replace("train", "test")
    settings |= {"DATASETS.TRAIN": [task.name], "DATASETS.TEST": [test]}
    if task.kind == "detection":
        settings |= {"INPUT.MIN_SIZE_TRAIN": [32], "INPUT.MIN_SIZE_TEST": 32}
    else:
        settings |= {"CLS.INPUT.VIEWS": ["test"], "CLS.INPUT.SIZE": 32}
    pairs = [str(item) for pair in settings.items() for item in pair]
    return load_config(overrides=[*pairs, *overrides])


def read_all(cfg):
    """The number of images in all of a run's batches."""
    task = open_task(cfg)
    view = "weak" if cfg.TASK == "detection" else "image"
    schedule = EpisodeSchedule(cfg.SOLVER.MAX_ITER)
    batches = task.build_batches(schedule, torch.device("cpu"), {"labeled": (view,)})
    steps = zip(range(len(schedule)), batches(0), strict=False)
    return sum(len(batch["labeled"].views[view]) for _, batch in steps)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-200])


def as_directory(path):
    path.unlink()
    path.mkdir()


def as_32_bits(path):
    Image.fromarray(np.full((32, 32), 200, np.float32)).save(path, format="tiff")


DAMAGES = {
    "cut off": cut_off,
    "empty": lambda path: path.write_bytes(b""),
    "no image": lambda path: path.write_text("hello"),
    "32 bits": as_32_bits,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_found_by_the_checker_and_before_a_test(task, damage):
    DAMAGES[damage](task.root / VICTIM)
    report = task.check(task.name, root=task.root)
    assert not report.is_sound
    assert [line for line in report.lines if VICTIM in line]
    dataset = TASKS[task.kind].load(task.name, root=task.root, **unchecked(task, damage))
    if damage != "empty" or task.kind == "classification":
        with pytest.raises(DataError, match=rf"data set {task.name} cannot be read: .*{VICTIM}"):
            task.check_readable(dataset)


def unchecked(task, damage):
    """Detection leaves an empty file out when it reads the set, as it looks at sizes of files."""
    return {"on_bad_record": "skip"} if (task.kind, damage) == ("detection", "empty") else {}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_training_image_follows_the_policy(task, damage, caplog):
    DAMAGES[damage](task.root / VICTIM)
    with pytest.raises(DataError, match=VICTIM):
        read_all(config(task))
    assert read_all(config(task, "DATASETS.ON_BAD_RECORD", "skip")) == 24
    what = "empty image file" if unchecked(task, damage) else VICTIM
    assert [line for line in caplog.messages if what in line]


def test_a_damaged_test_image_stops_a_run_whatever_the_policy(task):
    cut_off(task.root / "test/dog/1.png")
    with pytest.raises(DataError, match=r"test/dog/1\.png"):
        open_task(config(task, "DATASETS.ON_BAD_RECORD", "skip"))


def test_a_directory_that_is_named_like_an_image_is_none(task):
    as_directory(task.root / VICTIM)
    if task.kind == "detection":  # whose list names it
        assert [line for line in task.check(task.name, root=task.root).lines if VICTIM in line]
        with pytest.raises(DataError, match=f"{VICTIM}.*no such file"):
            task.load(task.name, root=task.root)
        assert len(task.load(task.name, root=task.root, on_bad_record="skip")) == 7
        assert len(task.load("folder:train", root=task.root, labeled=False)) == 7
    else:
        assert len(task.load(task.name, root=task.root)) == 7


def test_hidden_files_are_no_images(task):
    hidden = [".hidden/9.png", "__MACOSX/9.png", "dog/._1.png", "cat/.ipynb_checkpoints/0.png"]
    for name in [*hidden, "Thumbs.db", "dog/Thumbs.db"]:
        (task.root / "train" / name).parent.mkdir(exist_ok=True)
        (task.root / "train" / name).write_bytes(b"\0\5\x16\7")
    labeled = {"labeled": False} if task.kind == "detection" else {}
    assert len(task.load("folder:train", root=task.root, **labeled)) == 8


def test_a_folder_whose_name_no_disk_holds_has_no_unlabeled_images():
    with pytest.raises(DataError, match="x does not exist"):
        load_unlabeled(f"folder:{'x' * 300}", classes=("cat", "dog"))


def test_images_beside_the_folders_of_classes_are_counted(task, caplog):
    if task.kind == "detection":
        pytest.skip("has no folders of classes")
    os.rename(task.root / VICTIM, task.root / "train/1.png")
    assert len(task.load(task.name, root=task.root)) == 7
    stray = f"left out 1 images that are in no class's folder, such as {task.root}/train/1.png"
    assert [line for line in caplog.messages if stray in line]


def labeled_set(task, classes):
    """A registered data set of two images with these classes."""
    files = [str(task.root / "train/cat" / f"{i}.png") for i in range(2)]
    if task.kind == "classification":
        return dataset_of_files("birds", files, [0, 1], classes)
    none = np.zeros(1, bool)
    box = np.array([[1, 1, 9, 9]], np.float32)
    records = [
        ImageRecord(file, i, 32, 32, Annotations(box, np.array([i]), none, none))
        for i, file in enumerate(files)
    ]
    return detection.apply_policy(DetectionDataset("birds", tuple(records), classes))


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (("owl", "owl"), "'owl'"),
        (("owl", ""), "''"),
        (("owl", "  "), "'  '"),
        (("owl", None), "None"),
        (("owl", 7), "7"),
        (("owl", "\udcff"), r"'\\udcff'"),
    ],
)
def test_class_names_are_unique_texts(task, classes, named):
    with pytest.raises(DataError, match=rf"birds.*class 1.*{named}|birds.*and 1 are both named"):
        labeled_set(task, classes)


@pytest.mark.parametrize("other", ["Owl", "owl ", " owl"])
def test_names_that_differ_by_case_or_spaces_alone_are_warned_of(task, caplog, other):
    labeled_set(task, ("owl", other))
    assert [line for line in caplog.messages if "case or spaces alone" in line]


def test_a_test_set_may_lack_a_class_which_is_said(task, caplog):
    for i in range(2):
        (task.root / f"test/dog/{i}.png").unlink()
    (task.root / "test/dog").rmdir()
    content = json.loads((task.root / "test.json").read_text())
    content["images"], content["annotations"] = content["images"][:2], content["annotations"][:2]
    (task.root / "test.json").write_text(json.dumps(content))
    (test,) = open_task(config(task)).data.tests
    assert (len(test), test.classes) == (2, ("cat", "dog"))
    assert [line for line in caplog.messages if "dog" in line]


def write_list(task, content):
    """A list of images of each task: VOC's, and lines PATH LABEL."""
    if task.kind == "classification":
        (task.root / "list.txt").write_bytes(content)
        return "list:list.txt:train"
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (task.root / place).mkdir(parents=True, exist_ok=True)
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    entry = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    (task.root / "Annotations/other.xml").write_text(f"<annotation>{entry}</annotation>")
    (task.root / "ImageSets/Main/list.txt").write_bytes(content)
    return "voc:.:list"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("cat/v\xf6gel.png 0".encode("latin-1"), "1: is not UTF-8 text .byte 0xf6"),
        (b"\xef\xbb\xbfcat/0.png 0\ndog/\xff.png 1", "2: is not UTF-8 text .byte 0xff"),
        (b"cat/0.png 0\ncat/\0.png 1", "2: is no text"),
    ],
)
def test_a_list_that_is_no_utf_8_is_refused_with_its_line(task, content, line):
    name = write_list(task, content)
    with pytest.raises(DataError, match=rf"list\.txt:{line}"):
        task.load(name, root=task.root)


def test_a_byte_order_mark_is_no_part_of_a_path(task):
    name = write_list(task, b"\xef\xbb\xbfcat/0.png 0\n")
    if task.kind == "classification":
        assert task.load(name, root=task.root).files == (str(task.root / "train/cat/0.png"),)
    else:
        with pytest.raises(DataError, match=r"/cat/0\.png 0\.xml: image cat/0\.png 0: no an"):
            task.load(name, root=task.root)


def test_a_list_that_is_empty_is_refused(task):
    name = write_list(task, b"\n \n")
    with pytest.raises(DataError, match=r"list\.txt: empty split|list\.txt is empty"):
        task.load(name, root=task.root)


@pytest.mark.parametrize("place", ["{long}:{long}", "{long}.json:train", "a\0b:a\0b", "..:{long}"])
def test_names_that_no_disk_holds_are_one_line(task, place):
    place = place.format(long="x" * 300)
    for kind in ("coco", "voc", "list", "folder"):
        with pytest.raises(UserError) as caught:
            task.load(f"{kind}:{place}", root=task.root)
        assert str(caught.value).isprintable()


def test_a_file_whose_name_is_no_utf_8_is_read(task):
    os.rename(task.root / VICTIM, os.fsencode(task.root / "train/dog") + b"/v\xf6gel.png")
    if task.kind == "detection":
        dataset = task.load("folder:train", root=task.root, labeled=False)
        assert fingerprint(dataset).startswith("8:")
    else:
        assert image_fingerprint(task.load(task.name, root=task.root)).startswith("8:")


def test_a_key_that_stands_twice_in_yaml_is_refused(task, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"TASK: {task.kind}\nSEED: 1\nSOLVER: {{MAX_ITER: 5}}\nSEED: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml line 4: .*SEED stands twice"):
        load_config(file)
