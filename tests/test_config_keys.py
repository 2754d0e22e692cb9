"""Every configuration key is read by something."""

import pytest
import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.config import get_cfg, load_config
from ssod_imwa.config.reader import keys
from ssod_imwa.detection import build
from ssod_imwa.runs import run
from ssod_imwa.runs.hooks import ResultsHook
from ssod_imwa.runs.open import open_task


class Recording(CfgNode):
    """Notes which keys are read."""

    def __getattr__(self, name):
        value = super().__getattr__(name)
        self.__dict__["read"].add(self.__dict__["prefix"] + name)
        return value

    def __getitem__(self, name):
        if "read" in self.__dict__:
            self.__dict__["read"].add(self.__dict__["prefix"] + name)
        return super().__getitem__(name)


def recording(node, read, prefix=""):
    copy = Recording()
    for key, value in dict.items(node):
        inner = recording(value, read, f"{prefix}{key}.") if isinstance(value, CfgNode) else value
        dict.__setitem__(copy, key, inner)
    copy.__dict__.update(read=read, prefix=prefix)
    return copy


@pytest.fixture
def read(monkeypatch):
    """The names of the keys read so far."""
    # Whole-tree readers would make every key count as read.
    monkeypatch.setattr(run, "_identity", lambda task: {})
    monkeypatch.setattr(CfgNode, "dump", lambda self: "", raising=False)
    monkeypatch.setattr(ResultsHook, "_write", lambda hook: None)
    with_classes = build.with_classes
    monkeypatch.setattr(  # its copy would not record
        build, "with_classes", lambda cfg, classes: with_classes(cfg, classes) and cfg
    )
    return set()


def read_by_detection(read, config):
    plain = config(
        *("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "IMWA.BN", "recompute"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
    )
    run.train(recording(plain, read))


def read_by_classification(read, *overrides):
    """The parts of a classification run; `run.train` itself has been read by detection."""
    settings = {
        "TASK": "classification",
        "DATASETS.TRAIN": ["digit_images_train"],
        "DATASETS.TEST": ["digit_images_test"],
        "CLS.MODEL.NAME": "cifar_resnet20",
        "CLS.IMBALANCE.RATIO": 20,
        "SOLVER.MAX_ITER": 4,
        "CLS.TRACK_PERIOD": 1,
        "CLS.SNAPSHOT_PERIOD": 1,
    }
    pairs = [str(x) for pair in settings.items() for x in pair]
    cfg = recording(load_config(overrides=[*pairs, *map(str, overrides)]), read)
    task = open_task(cfg)
    method = task.build_method(torch.device("cpu"))
    task.parameter_groups(method.student)
    task.lr_factor("classifier.weight")
    task.coefficients(method)
    task.hooks()
    next(task.build_batches(EpisodeSchedule(4), torch.device("cpu"))(0))
    task.build_evaluator()(method.student.eval())


def test_every_key_is_read_by_something(read, detection_config):
    read_by_detection(read, detection_config)
    read_by_classification(read)
    read_by_classification(read, "CLS.SCHEDULE.EPOCHS", 0.2)
    read_by_classification(read, "CLS.SAMPLER.NAME", "balanced_subset")
    three, two = ["plain"] * 3, ["plain"] * 2
    read_by_classification(read, "CLS.ALGORITHM", "bcl", "CLS.INPUT.VIEWS", three)
    read_by_classification(read, "CLS.ALGORITHM", "paco", "CLS.INPUT.VIEWS", two)
    for method in ("ncl", "ecl"):
        experts = ("CLS.MODEL.EXPERTS", 2, "CLS.INPUT.VIEWS", two)
        read_by_classification(read, "CLS.ALGORITHM", method, *experts)
    decoder = ("CLS.MAE.DECODER_WIDTH", 16, "CLS.MAE.DECODER_DEPTH", 1, "CLS.MAE.DECODER_HEADS", 2)
    vit = ("CLS.MODEL.NAME", "vit_tiny_patch4_32", "CLS.TRACK_PERIOD", 0)
    read_by_classification(read, "CLS.ALGORITHM", "mae", *vit, *decoder)
    # Read where images are files, and where there are weights to begin with.
    elsewhere = {"CLS.INPUT.JITTER", "CLS.STAGE.RESET_CLASSIFIER"}
    assert set(keys(get_cfg())) - read <= elsewhere
