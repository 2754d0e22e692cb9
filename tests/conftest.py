import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import in_one_thread

from ssod_imwa.runs.config import load_config

# What short runs of each method need beside the settings of all.
METHODS = {
    "supervised": {},
    "unbiased_teacher": {
        "SSOD.BURN_IN_ITERS": 1,
        "SSOD.EMA_DECAY": 0.9,
        "SSOD.BBOX_THRESHOLD": 0.2,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
    },
    "mean_teacher": {
        "SSOD.RAMPUP_ITERS": 2,
        "SSOD.EMA_DECAY": 0.9,
        "SSOD.BBOX_THRESHOLD": 0.2,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
    },
    "soft_teacher": {
        "SSOD.EMA_DECAY": 0.9,
        "SSOD.EMA_BUFFERS": "ema",
        "SSOD.INITIAL_THRESHOLD": 0.1,
        "SSOD.RPN_THRESHOLD": 0.2,
        "SSOD.BBOX_THRESHOLD": 0.2,
        "SSOD.BOX_DEVIATION": 0.2,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
        "INPUT.STRONG.KIND": "geometric",
    },
    "dense_teacher": {
        "MODEL.META_ARCHITECTURE": "FCOS",
        "SSOD.EMA_START_ITERS": 0,
        "SSOD.BURN_IN_ITERS": 1,
        "SSOD.EMA_DECAY": 0.9,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 2,
    },
}
# What makes each detector small.
DETECTORS = {
    "GeneralizedRCNN": {
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    },
    "FCOS": {"MODEL.FPN.OUT_CHANNELS": 64, "MODEL.FCOS.NUM_CONVS": 1},
    "RetinaNet": {"MODEL.FPN.OUT_CHANNELS": 16, "MODEL.RETINANET.NORM": ""},
}


@pytest.fixture(scope="session", autouse=True)
def gpu_is_there():
    """Whether there is a GPU. It is hidden from the tests: bits are promised of CPUs."""
    there = torch.cuda.is_available()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield there


@pytest.fixture(autouse=True)
def gpu_for_tests_of_it(request, monkeypatch, gpu_is_there):
    """Shows the GPU to tests marked `gpu`."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_is_there)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight training and four test images with a bright square or a dark one each."""
    folder = tmp_path_factory.mktemp("datasets")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels = generator.integers(90, 160, (48, 64, 3), dtype=np.uint8)
            x, y = (int(v) for v in generator.integers(2, 24, 2))
            pixels[y : y + 16, x : x + 20] = 250 * (i % 2)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
            box = {"id": i, "image_id": i, "bbox": [x, y, 20, 16], "category_id": i % 2 + 1}
            annotations.append({**box, "area": 320, "iscrowd": 0})
        categories = [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def detection_config(root, tmp_path):
    """A function that loads a run of seconds, changed by KEY VALUE pairs.

    It is Unbiased Teacher's unless they name another method, and its usual detector's unless they
    name another one.
    """

    def load(*overrides, output="run"):
        settings = {
            "OUTPUT_DIR": tmp_path / output,
            "DATASETS.ROOT": root,
            "DATASETS.TRAIN": ["coco:train.json:train"],
            "DATASETS.TEST": ["coco:test.json:test"],
            "DATASETS.SPLIT.PERCENT": 50,
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.RESNETS.DEPTH": 18,
            "MODEL.RESNETS.NORM": "BN",
            "MODEL.BACKBONE.FREEZE_AT": 0,
            "INPUT.MIN_SIZE_TRAIN": [48],
            "INPUT.MIN_SIZE_TEST": 48,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.WARMUP_ITERS": 1,
            "SOLVER.IMS_PER_BATCH": 2,
            "LOG_PERIOD": 1,
        }
        method = next((name for name in METHODS if name in overrides), "unbiased_teacher")
        settings |= {"SSOD.ALGORITHM": method, **METHODS[method]}
        usual = settings.get("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
        settings |= DETECTORS[next((name for name in DETECTORS if name in overrides), usual)]
        if "MODEL.BACKBONE.NAME" in overrides:  # of timm, to which these do not belong
            del settings["MODEL.RESNETS.DEPTH"], settings["MODEL.RESNETS.NORM"]
        pairs = [str(x) for pair in settings.items() for x in pair]
        return load_config(overrides=[*pairs, *map(str, overrides)])

    return load


@pytest.fixture
def digits_config(tmp_path):
    """A function that loads a run of seconds on small images of digits, changed by KEY VALUE pairs.

    Of a pair that is given twice the last one counts.
    """

    def load(*overrides, output="run"):
        settings = {
            "TASK": "classification",
            "OUTPUT_DIR": tmp_path / output,
            "DATASETS.TRAIN": ["digit_images_train"],
            "DATASETS.TEST": ["digit_images_test"],
            "CLS.MODEL.NAME": "cifar_resnet20",
            "CLS.INPUT.FLIP": False,
            "TEST.IMS_PER_BATCH": 128,
            "LOG_PERIOD": 1,
        }
        pairs = [x for pair in settings.items() for x in pair]
        return load_config(overrides=[str(x) for x in (*pairs, *overrides)])

    return load


@pytest.fixture
def digits_fixmatch_config(digits_config):
    """`digits_config` of FixMatch: 20 labeled images of the largest class."""
    return partial(
        digits_config,
        *("CLS.ALGORITHM", "fixmatch", "CLS.IMBALANCE.RATIO", 10, "CLS.IMBALANCE.MAXIMUM", 20),
        *("SOLVER.BASE_LR", 0.01, "SOLVER.WARMUP_ITERS", 0, "SOLVER.IMS_PER_BATCH", 4),
        *("SOLVER.IMS_PER_BATCH_UNLABELED", 4, "DATALOADER.NUM_WORKERS", 0),
    )


@pytest.fixture
def one_thread():
    """PyTorch in one thread, as tests run side by side."""
    with in_one_thread():
        yield


@pytest.fixture(scope="session")
def real_data():
    """Folder of bccd and voc2007_mini: real photographs, kept outside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSOD_IMWA_REAL_DATA", beside))
    if not (folder / "bccd").is_dir():
        pytest.skip(f"no real data in {folder} (set SSOD_IMWA_REAL_DATA)")
    return folder


@pytest.fixture
def write_image():
    def write(path, width=40, height=30, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(path)

    return write
