"""Every key is read by something, and refused where nothing reads it."""

from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.config.options import Switch
from ssod_imwa.config.page import keys_page
from ssod_imwa.config.reader import Setting, build_config, keys
from ssod_imwa.config.sections import options_by_key
from ssod_imwa.detection import build
from ssod_imwa.errors import ConfigError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import CHAPTERS, SECTIONS, load_config
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


def read_by_detection(read, config, *overrides):
    run.train(recording(config("SOLVER.MAX_ITER", 2, *overrides), read), overwrite=True)


def test_every_key_of_detection_is_read(read, detection_config):
    of_all = ("IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "IMWA.BN", "recompute")
    of_all += ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "IMWA.OUTER.MOMENTUM", 0.5)
    of_all += ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    read_by_detection(read, detection_config, "MODEL.ROI_HEADS.LOSS", "FocalLoss", *of_all)
    cosine = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPartOfCosineLR")
    read_by_detection(read, detection_config, "SSOD.ALGORITHM", "mean_teacher", *cosine)
    read_by_detection(read, detection_config, "SSOD.ALGORITHM", "dense_teacher")
    retinanet = ("SSOD.ALGORITHM", "supervised", "MODEL.META_ARCHITECTURE", "RetinaNet")
    read_by_detection(read, detection_config, *retinanet)
    anchors = ("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]])
    anchors += ("SOLVER.OPTIMIZER", "AdamW")
    read_by_detection(read, detection_config, "MODEL.BACKBONE.NAME", "timm:resnet18", *anchors)
    drawn = ("DATALOADER.BATCH_RULE", "drawn", "DATALOADER.DRAWN_TOGETHER", 2)
    read_by_detection(read, detection_config, "SSOD.ALGORITHM", "soft_teacher", *drawn)
    # Other toolkits are tested in tests/integrations.
    elsewhere = {"MODEL.DETECTRON2.CONFIG"}
    sections = [*CHAPTERS["Both tasks"], *CHAPTERS["Detection"]]
    assert set(options_by_key(sections)) - read <= elsewhere


def images(count):
    return ("CLS.INPUT.VIEWS", ["plain"] * count)


def training(loss, mixer, sampler, *others):
    names = {"CLS.LOSS.NAME": loss, "CLS.MIX.KIND": mixer, "CLS.SAMPLER.NAME": sampler}
    return tuple(x for pair in names.items() for x in pair) + others


FEW = ("CLS.IMBALANCE.MAXIMUM", 20)  # else no digit is left unlabeled


def fixmatch(labeler, *others):
    settings = ("CLS.ALGORITHM", "fixmatch", "CLS.LABELER.NAME", labeler, "CLS.EMA_DECAY", 0.9)
    return (*settings, *FEW, *others)


VIT = ("CLS.MODEL.NAME", "vit_tiny_patch4_32")
COSINES = ("CLS.MODEL.CLASSIFIER", "cosine", "CLS.MODEL.SCALE", 1.0)
DECODER = ("CLS.MAE.DECODER_WIDTH", 16, "CLS.MAE.DECODER_DEPTH", 1, "CLS.MAE.DECODER_HEADS", 2)
CLASSIFIERS = [
    training("cross_entropy", "mixup", "instance"),
    training("focal", "mfw", "class"),
    training("ldam", "none", "square_root", *COSINES),
    training("balanced_softmax", "remix", "progressive"),
    training("label_aware_smoothing", "none", "reversed"),
    training("balanced_bce", "mixup_or_cutmix", "balanced_subset", *VIT),
    training("gml", "none", "instance"),
    training("cross_entropy", "manifold", "instance"),
    ("CLS.ALGORITHM", "bcl", *images(3)),
    ("CLS.ALGORITHM", "paco", *images(2)),
    ("CLS.ALGORITHM", "gpaco", *images(2)),
    ("CLS.ALGORITHM", "ncl", "CLS.MODEL.EXPERTS", 2, *images(2)),
    ("CLS.ALGORITHM", "ecl", "CLS.MODEL.EXPERTS", 2, *images(2)),
    ("CLS.ALGORITHM", "mae", *VIT, *DECODER),
    fixmatch("darp", "CLS.MODEL.NAME", "wrn_28_2"),
    fixmatch("alignment"),
    fixmatch("daso", "CLS.FIXMATCH.SECOND_HEAD", "abc"),
    fixmatch("acr", "CLS.FIXMATCH.SECOND_HEAD", "balanced"),
    ("CLS.ALGORITHM", "mean_teacher", "CLS.EMA_DECAY", 0.9, *FEW),
]


@pytest.mark.parametrize("overrides", CLASSIFIERS, ids=str)
def test_every_key_of_a_classifier_is_read(read, overrides):
    """The parts of a classification run; `run.train` itself is read by detection."""
    settings = {
        "TASK": "classification",
        "DATASETS.TRAIN": ["digit_images_train"],
        "DATASETS.TEST": ["digit_images_test"],
        "CLS.MODEL.NAME": "cifar_resnet20",
        "CLS.IMBALANCE.RATIO": 20,
        "SOLVER.MAX_ITER": 4,
        "CLS.SNAPSHOT_PERIOD": 1,
    }
    pairs = [str(x) for pair in settings.items() for x in pair]
    cfg = load_config(overrides=[*pairs, *map(str, overrides)])
    task = open_task(recording(cfg, read))
    method = task.build_method(torch.device("cpu"))
    task.parameter_groups(method.student)
    task.lr_factor("classifier.weight")
    task.coefficients(method)
    task.hooks()
    task.build_bn_recomputation(lambda start: iter(()), count=0)
    next(task.build_batches(EpisodeSchedule(4), torch.device("cpu"), method.reads)(0))
    task.build_evaluator()(method.student.eval())
    # Read where images are files, and where there are weights to begin with.
    elsewhere = {"CLS.INPUT.TEST_RESIZE", "CLS.STAGE.RESET_CLASSIFIER"}
    unread = {key for key in keys(cfg) if key.startswith("CLS.")} - read - elsewhere
    assert not unread


def chosen_by(section):
    """What has to be set for a section to be in the tree, also by way of other sections."""
    settings = {key: allowed_value(key, allowed) for key, allowed in section.when.items()}
    for key in section.when:
        owner = next(other for other in PARTS if key in other.by_key)
        settings = chosen_by(owner) | settings
    return settings


def allowed_value(key, allowed):
    if not isinstance(allowed, Switch):
        return allowed[0]
    option = options_by_key(SECTIONS)[key]
    lists = (option.default, ["randaugment"], ["standard"]) if option.is_list else ()
    values = (*option.choices, *lists, 1, 0.5, 2)
    return next(value for value in values if value in allowed and not option.violation(value))


PARTS = [part for section in SECTIONS for part in section.parts]
COMBINATIONS = list({str(sorted(x.items())): x for x in map(chosen_by, PARTS)}.values())


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda x: " ".join(map(str, x.values())))
def test_keys_that_nothing_reads_are_refused_by_name(chosen):
    settings = [Setting(key, value, "here") for key, value in chosen.items()]
    active = keys(build_config(SECTIONS, settings))
    for key, option in options_by_key(SECTIONS).items():
        if key not in active:
            with pytest.raises(ConfigError, match=rf"^here: {key} has no meaning with .* belongs"):
                build_config(SECTIONS, [*settings, Setting(key, option.default, "here")])


def test_the_page_of_keys_is_what_the_options_say():
    page = (Path(__file__).parents[2] / "docs/keys.md").read_text(encoding="utf-8")
    assert page == keys_page(CHAPTERS), "renew it: python tools/keys.py --write docs/keys.md"


def test_a_key_of_several_sections_has_one_type():
    types = {}
    for section in SECTIONS:
        for key, option in section.by_key.items():
            types.setdefault(key, set()).add((option.element, option.is_list))
    assert not {key: kinds for key, kinds in types.items() if len(kinds) > 1}


def test_defaults_obey_their_own_rules_and_every_key_says_what_it_means():
    for section in SECTIONS:
        for key, option in section.by_key.items():
            assert (key, option.violation(option.default)) == (key, "")
            assert option.help
