"""Every run of classification's tables can be built: data, schedule, streams, method.

Images are on the meta device, which has shapes and no numbers, and so are networks; the labels of
large sets have the published numbers of images and classes. What is semi-supervised also does a
step, on noise.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssod_imwa.averaging import ema
from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification import build, networks, task
from ssod_imwa.classification.data import build as data
from ssod_imwa.classification.data import splits
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import FeatureDataset
from ssod_imwa.classification.data.imbalance import imbalanced_counts
from ssod_imwa.classification.data.lists import PUBLISHED_LISTS
from ssod_imwa.classification.labelers.build import UnlabeledImages
from ssod_imwa.classification.methods import moco, paco
from ssod_imwa.classification.methods.build import build_method, method_name
from ssod_imwa.classification.models.feature_queue import FeatureQueue
from ssod_imwa.classification.task import ClassificationTask
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.errors import WeightsError
from ssod_imwa.papers.reproduction import run_config
from ssod_imwa.papers.tables import needed_runs, read_table
from ssod_imwa.runs.generations import all_generations
from ssod_imwa.runs.schedule import build_multiplier

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
    "stl10_train": ([500] * 10, 96),
    "stl10_32_train": ([500] * 10, 32),
    "imagenet127_32_train": (long_tail(1_281_167, 127, fewest=1000), 32),
    "imagenet127_64_train": (long_tail(1_281_167, 127, fewest=1000), 64),
}
UNLABELED = {"stl10_unlabeled": (100_000, 96), "stl10_32_unlabeled": (100_000, 32)}
TESTS = {
    **{f"{name.removesuffix('train')}test": name for name in SETS},
    "tiny_imagenet_val": "tiny_imagenet_train",
    "inaturalist18_val": "inaturalist18_train",
    "imagenet127_32_val": "imagenet127_32_train",
    "imagenet127_64_val": "imagenet127_64_train",
}
# Features in a file, and the stages that made them.
FEATURES = {
    "features:cifar10_lt_features": ((1280,), 0),
    "features:cifar10_lt_maps": ((9, 4, 4), 5),
}


def load_images(name, **settings):
    if name.startswith("features:"):
        return load_features(name)
    counts, edge = SETS[TESTS.get(name, name)]
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if name in TESTS:
        labels = torch.arange(len(counts))
    classes = tuple(str(c) for c in range(len(counts)))
    if edge is None:
        return ClassificationDataset(name, labels, classes, files=("image.jpg",) * len(labels))
    return ClassificationDataset(name, labels, classes, images=without_pixels(len(labels), edge))


def load_features(name):
    folder, _, file = name.partition("/")
    (shape, stages), counts = FEATURES[folder], SETS["cifar10_lt100_train"][0]
    counts = counts if file.startswith("train") else [1] * 10
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    features = torch.empty((len(labels), 6, *shape), dtype=torch.float16, device="meta")
    classes = tuple(map(str, range(10)))
    network = "tf_efficientnet_lite0"
    return FeatureDataset(
        name, labels, classes, images=features, weak=2, network=network, stages=stages
    )


def load_unlabeled(name, *, classes, **settings):
    count, edge = UNLABELED[name]
    labels = torch.full((count,), -1)
    images = without_pixels(count, edge)
    return ClassificationDataset(name, labels, classes, images=images, is_labeled=False)


def without_pixels(count, edge):
    return torch.empty((count, 3, edge, edge), dtype=torch.uint8, device="meta")


def on_meta(function):
    def call(*arguments, **settings):
        with torch.device("meta"):
            return function(*arguments, **settings)

    return call


def random_weights(function):
    """ImageNet's weights are not downloaded."""
    return lambda name, settings: function(name, replace(settings, pretrained=False))


class SmallQueue(FeatureQueue):
    def __init__(self, size, dim, **settings):
        super().__init__(min(size, 64), dim, **settings)


def replace_data(monkeypatch):
    """Data sets of the right size without pixels."""
    monkeypatch.setattr(data, "load_images", load_images)
    monkeypatch.setattr(data, "load_unlabeled", load_unlabeled)
    # Images are told apart by their pixels.
    monkeypatch.setattr(splits, "_digests", lambda dataset: [object() for _ in dataset.labels])
    monkeypatch.setattr(data, "with_pseudo_labels", lambda train, unlabeled, path: train)
    monkeypatch.setattr(task, "check_readable", lambda dataset: None)
    monkeypatch.setattr(task, "pick_device", lambda name: torch.device("meta"))


class Builder:
    """Builds the runs of a table, each from the network of the one that it comes after."""

    def __init__(self, table, monkeypatch):
        self.table = table
        self.states = {}
        self.built = {}
        replace_data(monkeypatch)
        monkeypatch.setattr(networks, "foreign_state", lambda model, source: None)
        monkeypatch.setattr(networks, "read_models", self.read_models)
        # What looks at numbers: there are none.
        monkeypatch.setattr(networks, "normalize_classifier", lambda model, tau: None)
        monkeypatch.setattr(ema, "nonfinite", lambda tensors: [])
        monkeypatch.setattr(networks, "build_model", on_meta(networks.build_model))
        monkeypatch.setattr(networks, "build_classifier", random_weights(networks.build_classifier))
        for module in (moco, paco):  # 65,536 rows take seconds to draw
            monkeypatch.setattr(module, "FeatureQueue", SmallQueue)

    def read_models(self, source):
        return SimpleNamespace(weights=self.states[Path(source).name])

    def build(self, run):
        initial = None if run.after is None else Path("runs") / run.after
        cfg = run_config(self.table, run, seed=1, output=Path("runs") / run.name, initial=initial)
        for generation in all_generations(cfg):
            made = ClassificationTask(generation)
            check_schedule(made.cfg)
            check_order(made)
            self.states[run.name] = self._build_once(made, run)

    def _build_once(self, made, run):
        """The student's state; runs that differ by data and schedule alone share it."""
        cfg = made.cfg.clone()
        cfg.defrost()
        for name in ("SOLVER", "IMWA", "TEST", "DATASETS", "OUTPUT_DIR", "MODEL", "SEED"):
            del cfg[name]
        for name in ("IMBALANCE", "SCHEDULE", "SAMPLER", "UNLABELED", "CREST"):
            cfg.CLS.pop(name, None)
        state = self.states.get(run.after)
        key = (cfg.dump(), len(made.classes), id(state))
        if key not in self.built:
            method = made.build_method(torch.device("meta"))
            check_views(made, method.reads)
            schedule = EpisodeSchedule(made.cfg.SOLVER.MAX_ITER)
            made.build_batches(schedule, made.device, method.reads)
            made.parameter_groups(method.student)
            made.hooks()
            self.built[key] = method.student.state_dict()
        return self.built[key]


def check_schedule(cfg):
    solver, imwa = cfg.SOLVER, cfg.IMWA
    schedule = EpisodeSchedule(solver.MAX_ITER, episodes=imwa.EPISODES, members=imwa.MEMBERS)
    assert len(schedule) == solver.MAX_ITER * imwa.MEMBERS
    assert all(step < solver.MAX_ITER for step in solver.get("STEPS", ()))
    assert solver.WARMUP_ITERS < solver.MAX_ITER or solver.BASE_LR == 0
    multiplier = build_multiplier(cfg)
    assert 0 < multiplier(0) <= 1


def check_order(made):
    cfg, train = made.cfg, made.data.train
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    order = build.build_order(cfg, train)(batch_size, seed=1, member=cfg.IMWA.MEMBERS - 1)
    batch = order.batch(cfg.SOLVER.MAX_ITER - 1)
    assert len(batch) == batch_size
    assert 0 <= min(batch) <= max(batch) < len(train)


def check_views(made, reads):
    options, train = made.cfg.CLS.INPUT, made.data.train
    views = build.build_views(made.cfg, train, options.VIEWS)
    assert len(views) == len(reads["labeled"])
    views.append(build.build_test_view(made.cfg, train))
    if "unlabeled" in reads:
        assert len(options.UNLABELED_VIEWS) == len(reads["unlabeled"])
        views += build.build_views(made.cfg, made.data.unlabeled, options.UNLABELED_VIEWS)
    for view in views:
        if isinstance(train, FeatureDataset):
            stored = torch.zeros(1, *train.images.shape[1:], dtype=torch.float16)
            seen = view(stored, torch.rand(1, view.numbers, dtype=torch.float64))[0]
            assert seen.shape == train.images.shape[2:]
            continue
        size = options.SIZE
        if train.images is None:
            seen = view(torch.zeros(3, size + 40, size + 60, dtype=torch.uint8))
        else:
            stored = torch.zeros(1, *train.images.shape[1:], dtype=torch.uint8)
            seen = view(stored, torch.rand(1, view.numbers, dtype=torch.float64))[0]
        assert seen.shape == (3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(TABLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_table_can_be_built(path, monkeypatch):
    table = read_table(path)
    first = run_config(table, next(iter(table.runs.values())), seed=1, output=Path("out"))
    known = all(x in SETS or x.partition("/")[0] in FEATURES for x in first.DATASETS.TRAIN)
    if first.TASK != "classification" or not known:
        pytest.skip("a table of detection, or of data sets that are not above")
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


def semi_supervised_recipes():
    """A run of each method on each data set and network."""
    recipes = {}
    for path in sorted([*TABLES.glob("imwa_*.yaml"), TABLES / "cissic_small.yaml"]):
        table = read_table(path)
        for run in table.runs.values():
            cfg = run_config(table, run, seed=1, output=Path("out"))
            if cfg.TASK != "classification":
                break
            if "UNLABELED" in cfg.CLS:
                name = f"{method_name(cfg)}, {cfg.DATASETS.TRAIN[0]}, {cfg.CLS.MODEL.NAME}"
                recipes.setdefault(name, cfg)
    return recipes


RECIPES = semi_supervised_recipes()


def test_there_are_tables_of_all_semi_supervised_methods():
    methods = {name.split(",")[0] for name in RECIPES}
    for images in ("cifar10", "cifar100", "stl10", "imagenet127_32", "imagenet127_64"):
        assert any(f"{images}_train" in name for name in RECIPES)
    assert methods >= {
        *("mean_teacher", "fixmatch", "fixmatch + la", "fixmatch + darp", "fixmatch + crest"),
        *("fixmatch + crest+", "fixmatch + abc", "fixmatch + daso", "acr", "cossl"),
        *("fixmatch + la + darp", "fixmatch + la + crest+", "fixmatch + la + daso"),
        "fixmatch + abc + daso",
    }


def small_batch(cfg, reads, classes):
    size = cfg.CLS.INPUT.SIZE
    draw = torch.Generator().manual_seed(0)

    def part(views):
        labels = torch.randint(classes, (2,), generator=draw)
        images = {view: torch.rand(2, 3, size, size, generator=draw) for view in views}
        return Part(images, labels, torch.arange(2))

    return Batch(**{stream: part(views) for stream, views in reads.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_step_of_each_semi_supervised_recipe(name):
    cfg = RECIPES[name]
    classes = len(SETS[cfg.DATASETS.TRAIN[0]][0])
    counts = [2 * classes - k for k in range(classes)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.build_model(cfg, classes, weights="")
        method = build_method(cfg, model, counts, UnlabeledImages(3 * classes, counts))
    method.set_train_mode()
    late = round(0.8 * cfg.SOLVER.MAX_ITER)  # past every warm-up, and DARP refines its labels
    losses = method.losses(small_batch(cfg, method.reads, classes), late)
    terms = [value for key, value in losses.items() if key.startswith("loss")]
    torch.stack(terms).sum().backward()
    assert all(torch.isfinite(term) for term in terms)
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    method.after_step(late)
