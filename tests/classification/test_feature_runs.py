"""Whole runs of heads on cached features, and what is refused there."""

import numpy as np
import pytest
import torch

from ssod_imwa.classification.data.datasets import load_digit_images
from ssod_imwa.classification.data.feature_sets import write_features
from ssod_imwa.errors import UserError
from ssod_imwa.runs import run
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import read_results

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 24
ACR = (
    *("CLS.LABELER.NAME", "acr", "CLS.FIXMATCH.SECOND_HEAD", "balanced"),
    *("CLS.FIXMATCH.STRONG_VIEWS", 2, "CLS.UNLABELED.MEMBERSHIP", "joint"),
    *("CLS.INPUT.UNLABELED_VIEWS", ["weak", "randaugment", "randaugment"]),
    *("CLS.LABELER.EPOCH", 5, "CLS.LABELER.START_EPOCH", 1),
)
FIXMATCH = (
    *("CLS.ALGORITHM", "fixmatch", "CLS.UNLABELED.MAXIMUM", 80, "CLS.EMA_DECAY", 0.9),
    *("CLS.IMBALANCE.RATIO", 5, "CLS.IMBALANCE.MAXIMUM", 20),
)
METHODS = {
    "cross_entropy + mixup": ("CLS.IMBALANCE.RATIO", 5, "CLS.MIX.KIND", "mixup"),
    "fixmatch + la + daso": (
        *(*FIXMATCH, "CLS.LABELER.NAME", "daso", "CLS.LABELER.WARMUP", 5),
        *("CLS.LOSS.NAME", "balanced_softmax"),
    ),
    "fixmatch + abc": (*FIXMATCH, "CLS.FIXMATCH.SECOND_HEAD", "abc"),
    "acr": (*FIXMATCH, *ACR),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Random projections of digits, the strong views with noise."""
    folder = tmp_path_factory.mktemp("features")
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(32 * 32, WIDTH, generator=generator) / 32
    for split, views in (("train", 4), ("test", 1)):
        images = load_digit_images(split)
        plain = (images.images[:, 0].flatten(1) / 255.0) @ projection
        noise = torch.randn(len(plain), views, WIDTH, generator=generator) / 20
        noise[:, 0] = 0
        features = (plain[:, None] + noise).half()
        weak, made = min(views, 2), {"source": "a projection"}
        write_features(folder / f"{split}.pt", features, images, weak=weak, made=made)
        made = {"source": "another"}
        write_features(folder / f"{split}_other.pt", features, images, weak=weak, made=made)
        maps = torch.zeros(len(plain), 1, 192, 2, 2, dtype=torch.float16)
        maps[..., :10, 0, 0] = torch.nn.functional.one_hot(images.labels, 10)[:, None]
        made = {"source": "labels", "network": "tf_efficientnet_lite0", "stages": 6}
        write_features(folder / f"{split}_maps.pt", maps, images, weak=1, made=made)
    return folder


@pytest.fixture
def config(root, tmp_path):
    def load(*overrides):
        settings = {
            "TASK": "classification",
            "OUTPUT_DIR": tmp_path / "run",
            "MODEL.DEVICE": "cpu",
            "DATASETS.ROOT": root,
            "DATASETS.TRAIN": ["features:train.pt"],
            "DATASETS.TEST": ["features:test.pt"],
            "CLS.MODEL.NAME": "feature_head",
            "CLS.INPUT.VIEWS": ["weak"],
            "SOLVER.MAX_ITER": 30,
            "SOLVER.IMS_PER_BATCH": 32,
            "SOLVER.BASE_LR": 0.2,
            "SOLVER.WARMUP_ITERS": 0,
            "TEST.IMS_PER_BATCH": 400,
        }
        if "feature_tail" not in overrides:
            settings |= {"CLS.MODEL.WIDTH": WIDTH, "CLS.MODEL.HIDDEN": 16}
        pairs = [x for pair in settings.items() for x in pair]
        return load_config(overrides=[str(x) for x in (*pairs, *overrides)])

    return load


@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy + mixup",
        "acr",
        pytest.param("fixmatch + la + daso", marks=pytest.mark.slow),
        pytest.param("fixmatch + abc", marks=pytest.mark.slow),
    ],
)
def test_methods_learn_from_features_under_imwa(config, name):
    cfg = config(*METHODS[name], "IMWA.MEMBERS", 2, "IMWA.EPISODES", 4)
    assert run.train(cfg) == 0
    results = read_results(cfg.OUTPUT_DIR)
    assert results.method == name
    top1 = results.headline().metrics["top1"]
    assert top1 > 25  # by chance 10
    assert run.evaluate(cfg)["top1"] == pytest.approx(top1)


TAIL = (
    *("DATASETS.TRAIN", ["features:train_maps.pt"], "DATASETS.TEST", ["features:test_maps.pt"]),
    *("CLS.MODEL.NAME", "feature_tail", "CLS.MODEL.CACHED_STAGES", 6),
    *("SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.05),
)


def test_last_stages_learn_from_maps_under_imwa(config):
    cfg = config(*TAIL, "IMWA.MEMBERS", 2, "IMWA.EPISODES", 2, "IMWA.BN", "recompute")
    assert run.train(cfg) == 0
    assert read_results(cfg.OUTPUT_DIR).headline().metrics["top1"] > 90  # maps say the label


@pytest.mark.slow  # 600 iterations
def test_a_linear_head_finds_what_logistic_regression_finds(config, root):
    from sklearn.linear_model import LogisticRegression

    cfg = config(
        *("CLS.MODEL.HIDDEN", 0, "CLS.INPUT.VIEWS", ["none"], "SOLVER.MAX_ITER", 600),
        *("SOLVER.WEIGHT_DECAY", 0.001, "DATASETS.TEST", ["features:train.pt:held_out"]),
        *("DATASETS.TRAIN", ["features:train.pt:fit"], "SOLVER.IMS_PER_BATCH", 256),
        *("SOLVER.BASE_LR", 0.5),
    )
    run.train(cfg)
    content = torch.load(root / "train.pt", weights_only=True)
    x, y = content["features"][:, 0].float().numpy(), content["labels"].numpy()
    rank = np.zeros(len(y), int)
    for label in range(10):
        rank[y == label] = np.arange((y == label).sum())
    held_out = rank % 5 == 0
    # 1 / (C n) is the decay of a mean loss.
    reference = LogisticRegression(C=1 / (0.001 * (~held_out).sum()), max_iter=1000)
    reference.fit(x[~held_out], y[~held_out])
    expected = 100 * reference.score(x[held_out], y[held_out])
    found = read_results(cfg.OUTPUT_DIR).headline().metrics["top1"]
    assert found == pytest.approx(expected, abs=1.5)
    assert expected > 60


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("CLS.MODEL.WIDTH", 8), "CLS.MODEL.WIDTH = 8 is not allowed with features:train.pt"),
        (
            ("DATASETS.TEST", ["features:test_other.pt"]),
            "features of features:test_other.pt are by another, those of features:train.pt by a",
        ),
        (
            ("DATASETS.TRAIN", ["digit_images_train"]),
            "'feature_head' is not allowed with digit_images_train, which holds images",
        ),
        (
            ("DATASETS.TRAIN", ["features:train_maps.pt"]),
            "'feature_head' is not allowed with features:train_maps.pt, which holds cached maps .m"
            "ust be 'feature_tail'",
        ),
        (
            (*TAIL, "CLS.MODEL.CACHED_STAGES", 5),
            "CACHED_STAGES = 5 are not allowed with features:train_maps.pt .must be 'tf_efficientn"
            "et_lite0' and 6, which made it",
        ),
        (("CLS.INPUT.VIEWS", ["sim"]), "view 'sim' is not allowed for features"),
        (("CLS.MIX.KIND", "mixup_or_cutmix"), "'mixup_or_cutmix' is not allowed with CLS.MODEL"),
        (("CLS.INPUT.SIZE", 32), "CLS.INPUT.SIZE has no meaning with CLS.MODEL.NAME"),
        (("TEST.FLIP", True), "TEST.FLIP has no meaning with CLS.MODEL.NAME"),
    ],
)
def test_what_needs_pixels_or_other_features_is_refused(config, overrides, message):
    with pytest.raises(UserError, match=message):
        run.train(config(*overrides))


def test_a_network_of_images_is_refused_on_features(root, tmp_path):
    sets = ("DATASETS.TRAIN", "['features:train.pt']", "DATASETS.TEST", "['features:test.pt']")
    overrides = ("TASK", "classification", "DATASETS.ROOT", str(root), *sets)
    cfg = load_config(overrides=[*overrides, "OUTPUT_DIR", str(tmp_path / "run")])
    message = "'cifar_resnet32' is not allowed with features:train.pt, which holds cached features"
    with pytest.raises(UserError, match=message):
        run.train(cfg)
