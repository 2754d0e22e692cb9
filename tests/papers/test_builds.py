"""Every run of supervised classification's tables can be built: data, schedule, order, method.

Images are on the meta device, which has shapes and no numbers, and so are networks; the labels of
large sets have the published numbers of images and classes.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssod_imwa.averaging import ema
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification import build, task
from ssod_imwa.classification.data import build as data
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.imbalance import imbalanced_counts
from ssod_imwa.classification.data.lists import PUBLISHED_LISTS
from ssod_imwa.classification.methods import moco, paco
from ssod_imwa.classification.models.feature_queue import FeatureQueue
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.engine.solver import lr_multiplier
from ssod_imwa.errors import WeightsError
from ssod_imwa.papers.reproduction import run_config
from ssod_imwa.papers.tables import needed_runs, read_table

TABLES = Path(__file__).parents[2] / "configs/tables"


def long_tail(images, classes, *, fewest):
    """As many images in all, the fewest in the last class."""
    shares = np.geomspace(1, 1e-4, classes)
    counts = fewest + ((images - fewest * classes) * shares / shares.sum()).astype(int)
    counts[0] += images - counts.sum()
    return counts.tolist()


def published(name, fewest):
    return long_tail(*PUBLISHED_LISTS[name], fewest=fewest)


# Training images of each class, and the edge of those that are read into memory.
SETS = {
    "cifar10_train": ([5000] * 10, 32),
    "cifar10_lt100_train": (imbalanced_counts(10, maximum=5000, ratio=100), 32),
    "cifar100_train": ([500] * 100, 32),
    "digit_images_train": ([143] * 10, 32),
    "tiny_imagenet_train": ([500] * 200, 64),
    "tiered_imagenet_train": ([1230] * 351 + [5] * 160, 84),
    "imagenet_lt_train": (published("ImageNet_LT_train", 5), None),
    "places_lt_train": (published("Places_LT_train", 5), None),
    "inaturalist18_train": (published("iNaturalist18_train", 2), None),
}
TESTS = {
    **{f"{name.removesuffix('train')}test": name for name in SETS},
    "tiny_imagenet_val": "tiny_imagenet_train",
    "inaturalist18_val": "inaturalist18_train",
}


def load_images(name, **settings):
    counts, edge = SETS[TESTS.get(name, name)]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if name in TESTS:
        labels = torch.arange(len(counts))
    classes = tuple(str(c) for c in range(len(counts)))
    if edge is None:
        return ClassificationDataset(name, labels, classes, files=("image.jpg",) * len(labels))
    images = torch.empty((len(labels), 3, edge, edge), dtype=torch.uint8, device="meta")
    return ClassificationDataset(name, labels, classes, images=images)


def on_meta(function):
    def call(*arguments, **settings):
        with torch.device("meta"):
            return function(*arguments, **settings)

    return call


def random_weights(function):
    """ImageNet's weights are not downloaded."""
    return lambda *names, **settings: function(*names, **{**settings, "pretrained": False})


class SmallQueue(FeatureQueue):
    def __init__(self, size, dim, **settings):
        super().__init__(min(size, 64), dim, **settings)


class Builder:
    """Builds the runs of a table, each from the network of the one that it comes after."""

    def __init__(self, table, monkeypatch):
        self.table = table
        self.states = {}
        self.built = {}
        monkeypatch.setattr(data, "load_images", load_images)
        monkeypatch.setattr(task, "check_readable", lambda dataset: None)
        monkeypatch.setattr(build, "foreign_state", lambda model, source: None)
        monkeypatch.setattr(build, "read_models", self.read_models)
        # What looks at numbers: there are none.
        monkeypatch.setattr(build, "normalize_classifier", lambda model, tau: None)
        monkeypatch.setattr(ema, "nonfinite", lambda tensors: [])
        monkeypatch.setattr(build, "build_model", on_meta(build.build_model))
        monkeypatch.setattr(build, "build_classifier", random_weights(build.build_classifier))
        for module in (moco, paco):  # 65,536 rows take seconds to draw
            monkeypatch.setattr(module, "FeatureQueue", SmallQueue)

    def read_models(self, source):
        return SimpleNamespace(weights=self.states[Path(source).name])

    def build(self, run):
        initial = None if run.after is None else Path("runs") / run.after
        cfg = run_config(self.table, run, seed=1, output=Path("runs") / run.name, initial=initial)
        made = ClassificationTask(cfg)
        check_schedule(made.cfg)
        check_order(made)
        self.states[run.name] = self._build_once(made, run)

    def _build_once(self, made, run):
        """The student's state; runs that differ by data and schedule alone share it."""
        cfg = made.cfg.clone()
        cfg.defrost()
        for name in ("SOLVER", "IMWA", "TEST", "DATASETS", "OUTPUT_DIR", "MODEL", "SEED"):
            del cfg[name]
        for name in ("IMBALANCE", "SCHEDULE", "SAMPLER"):
            del cfg.CLS[name]
        state = self.states.get(run.after)
        key = (cfg.dump(), len(made.classes), id(state))
        if key not in self.built:
            method = made.build_method(torch.device("meta"))
            check_views(made, method.reads["labeled"])
            made.parameter_groups(method.student)
            made.hooks()
            self.built[key] = method.student.state_dict()
        return self.built[key]


def check_schedule(cfg):
    solver, imwa = cfg.SOLVER, cfg.IMWA
    schedule = EpisodeSchedule(solver.MAX_ITER, episodes=imwa.EPISODES, members=imwa.MEMBERS)
    assert len(schedule) == solver.MAX_ITER * imwa.MEMBERS
    assert all(step < solver.MAX_ITER for step in solver.STEPS)
    assert solver.WARMUP_ITERS < solver.MAX_ITER or solver.BASE_LR == 0
    multiplier = lr_multiplier(
        solver.LR_SCHEDULER_NAME,
        max_iter=solver.MAX_ITER,
        steps=solver.STEPS,
        gamma=solver.GAMMA,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
    )
    assert 0 < multiplier(0) <= 1


def check_order(made):
    cfg, train = made.cfg, made.data.train
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    order = build.build_order(cfg, train)(batch_size, seed=1, member=cfg.IMWA.MEMBERS - 1)
    batch = order.batch(cfg.SOLVER.MAX_ITER - 1)
    assert len(batch) == batch_size
    assert 0 <= min(batch) <= max(batch) < len(train)


def check_views(made, names):
    options, train = made.cfg.CLS.INPUT, made.data.train
    views = build.build_views(made.cfg, train, options.VIEWS)
    assert len(views) == len(names)
    size = options.SIZE
    image = torch.zeros(3, size, size, dtype=torch.uint8)
    for view in (*views, build.build_test_view(made.cfg, train)):
        if train.images is None:
            seen = view(torch.zeros(3, size + 40, size + 60, dtype=torch.uint8))
        else:
            assert train.images.shape[1:] == image.shape
            seen = view(image[None], torch.rand(1, view.numbers, dtype=torch.float64))[0]
        assert seen.shape == image.shape


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_table_can_be_built(path, monkeypatch):
    table = read_table(path)
    first = run_config(table, next(iter(table.runs.values())), seed=1, output=Path("out"))
    if first.TASK != "classification" or not set(first.DATASETS.TRAIN) <= set(SETS):
        pytest.skip("a table of detection, or of data sets that are not above")
    if "UNLABELED" in first.CLS:
        pytest.skip("unlabeled images are compared by their pixels, which are not there")
    builder = Builder(table, monkeypatch)
    for run in needed_runs(table, table.rows):
        try:
            builder.build(run)
        except Exception as error:
            raise AssertionError(f"{path.name}: {run.name}: {error}") from error


def test_a_stage_that_does_not_fit_the_one_before_is_found(tmp_path, monkeypatch):
    """The check itself: a second stage of another network."""
    configs = TABLES.parent.resolve()
    path = tmp_path / "table.yaml"
    path.write_text(
        "title: T\nruns:\n"
        f"  first: {{config: {configs}/cifar10_lt/cross_entropy.yaml}}\n"
        f"  second: {{config: {configs}/cifar10_lt/crt.yaml, after: first, "
        "overrides: {CLS.MODEL.NAME: cifar_resnet20, CLS.STAGE.RESET_CLASSIFIER: False}}\n"
        "rows: [{label: second, run: second}]\n"
    )
    table = read_table(path)
    builder = Builder(table, monkeypatch)
    first, second = needed_runs(table, table.rows)
    builder.build(first)
    with pytest.raises(WeightsError, match=r"runs/first is of another network than CLS.MODEL"):
        builder.build(second)
