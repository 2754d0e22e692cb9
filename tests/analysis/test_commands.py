"""Analyses of real, tiny runs: numbers that are known from elsewhere."""

import re

import numpy as np
import pytest
import torch
from support import in_one_thread

from ssod_imwa.analysis import commands, weight_commands
from ssod_imwa.analysis.build import open_run, sample_of_test
from ssod_imwa.classification.data import catalog as image_catalog
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.tracking import snapshot_files
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import CheckpointError, UserError, WeightsError
from ssod_imwa.runs import run as runs
from ssod_imwa.runs.config import load_config
from ssod_imwa.runs.results import read_results

CLASSES = ("cat", "dog", "owl", "yak", "zebu")
TRAIN_COUNTS, TEST_COUNTS = [120, 30, 20, 6, 3], [8] * 5


def dataset(name, counts):
    """Noise around a gray of the class's own, 8 x 8 pixels."""
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = counted_generator(name).integers(-60, 60, size=(len(labels), 3, 8, 8))
    pixels = np.clip(40 * labels[:, None, None, None] + 40 + noise, 0, 255).astype(np.uint8)
    return ClassificationDataset(
        name, torch.from_numpy(labels), CLASSES, images=torch.from_numpy(pixels)
    )


@pytest.fixture(scope="module", autouse=True)
def _data():
    with in_one_thread(), pytest.MonkeyPatch.context() as patch:
        for name, counts in (("tiny_train", TRAIN_COUNTS), ("tiny_test", TEST_COUNTS)):
            patch.setitem(
                image_catalog._LOADERS, name, lambda root, n=name, c=counts: dataset(n, c)
            )
        yield


def train(folder, *overrides):
    settings = {
        "TASK": "classification",
        "OUTPUT_DIR": folder,
        "DATASETS.TRAIN": ["tiny_train"],
        "DATASETS.TEST": ["tiny_test"],
        "CLS.MODEL.NAME": "cifar_resnet20",
        "CLS.INPUT.SIZE": 8,
        "SOLVER.MAX_ITER": 40,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.IMS_PER_BATCH": 16,
        "TEST.IMS_PER_BATCH": 100,
        "IMWA.BN_BATCHES": 4,
    }
    pairs = [str(x) for pair in settings.items() for x in pair]
    assert runs.train(load_config(overrides=[*pairs, *map(str, overrides)])) == 0
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One network, and curves of its classes."""
    folder = train(tmp_path_factory.mktemp("runs") / "plain", "CLS.TRACK_PERIOD", 20)
    return open_run(folder)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Two members that are averaged once, with snapshots."""
    settings = ("IMWA.MEMBERS", 2, "CLS.SNAPSHOT_PERIOD", 15, "SEED", 2)
    return open_run(train(tmp_path_factory.mktemp("runs") / "averaged", *settings))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    settings = ("CLS.MODEL.EXPERTS", 2)
    return open_run(train(tmp_path_factory.mktemp("runs") / "experts", *settings))


def columns(table):
    return {str(column.header): list(column.cells) for column in table.columns}


def final(run):
    return read_results(run.folder).headline().metrics


def near(number):
    """As a table prints it, with four digits."""
    return pytest.approx(number, rel=1e-3, abs=1e-3)


def test_calibration_is_that_of_the_results(plain):
    found = commands.calibration(plain)
    assert list(found.figures) == ["calibration.png"]
    (table,) = found.tables
    assert table.title.startswith(f"ECE {final(plain)['ece']:.2f} %")
    assert sum(int(x) for x in columns(table)["images"]) == 40
    with pytest.raises(UserError, match="--bins = 0 is not allowed"):
        commands.calibration(plain, bins=0)


def test_confusion_has_the_right_ones_on_its_diagonal(plain):
    found = commands.confusion(plain)
    matrix = np.asarray(found.figures["confusion.png"].axes[0].get_images()[0].get_array())
    assert 100 * np.trace(matrix) / 40 == pytest.approx(final(plain)["top1"])
    for row, name in enumerate(CLASSES):  # they are in the order of frequency already
        assert 100 * matrix[row, row] / 8 == pytest.approx(final(plain)[f"recall-{name}"])
    mistakes = columns(found.tables[0])
    first = CLASSES.index(mistakes["true class"][0]), CLASSES.index(mistakes["predicted as"][0])
    assert int(mistakes["images"][0]) == matrix[first]
    assert matrix[first] == (matrix - np.diag(np.diag(matrix))).max()


def test_classes_have_the_metrics_of_the_results_and_curves(plain):
    found = commands.classes(plain)
    assert list(found.figures) == ["recall.png", "class_curves.png"]
    numbers = dict(zip(*columns(found.tables[0]).values(), strict=True))
    metrics = final(plain)
    assert float(numbers["top-1"]) == near(metrics["top1"])
    assert float(numbers["few"]) == near(metrics["few"])
    assert float(numbers["H-mean"]) == near(metrics["h_mean"])
    assert int(numbers["classes with recall 0"]) == metrics["zero_recall_classes"]
    epochs = found.figures["class_curves.png"].axes[0].get_lines()[0].get_xdata()
    np.testing.assert_allclose(epochs, [20 * 16 / 179, 40 * 16 / 179])


def test_a_run_without_curves_has_recalls_alone(averaged):
    assert list(commands.classes(averaged).figures) == ["recall.png"]


def test_features_are_those_of_the_last_row_of_the_run(plain):
    found = columns(commands.features(plain).tables[0])
    assert found["class"] == list(CLASSES)
    assert [int(x) for x in found["images"]] == TRAIN_COUNTS
    curves = commands.classes(plain).figures["class_curves.png"].axes
    for panel, name in enumerate(["accuracy (%)", "gradient norm", "ratio"]):
        lines = curves[panel].get_lines()[:5]
        for line, shown in zip(lines, found[name], strict=True):
            assert float(shown) == near(line.get_ydata()[-1])
    with pytest.raises(UserError, match="--group = 'x' is not allowed"):
        commands.features(plain, group="x")
    assert commands.features(plain, group="layer1").figures


def test_the_middle_of_a_landscape_is_the_network(plain):
    before = {name: x.clone() for name, x in plain.model.state_dict().items()}
    found = columns(weight_commands.landscape(plain, directions=2, points=3).tables[0])
    assert found["ε"] == ["-1.00", "+0.00", "+1.00"]
    assert float(found["test accuracy (%)"][1]) == near(final(plain)["top1"])
    plane = weight_commands.landscape(plain, points=3, plane=True, radius=0.5)
    assert list(plane.figures) == ["landscape_plane.png"]
    assert columns(plane.tables[0])["test accuracy (%)"][1] == found["test accuracy (%)"][1]
    after = plain.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_landscape_is_the_same_when_it_is_drawn_again(plain):
    one, other = (weight_commands.landscape(plain, directions=1, points=3) for _ in range(2))
    assert columns(one.tables[0]) == columns(other.tables[0])


@pytest.mark.parametrize(
    "options", [{"points": 4}, {"points": 1}, {"directions": 0}, {"radius": 0}, {"images": -1}]
)
def test_a_landscape_that_cannot_be_is_refused(plain, options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f"--{name} = {value} is not allowed"):
        weight_commands.landscape(plain, **options)


def test_part_of_the_test_images_is_balanced(plain):
    assert len(sample_of_test(plain, 0)) == 40
    assert sample_of_test(plain, 12).counts == [2] * 5


def test_the_ends_of_a_line_are_the_two_runs(plain, averaged):
    fresh = open_run(plain.folder)
    found = weight_commands.interpolate(fresh, averaged.folder, points=3, bn="both")
    for table in found.tables:
        top1 = columns(table)["top-1"]
        assert float(top1[0]) == near(final(plain)["top1"])
        assert float(top1[-1]) == near(final(averaged)["top1"])
    average, recomputed = (columns(table)["loss"] for table in found.tables)
    assert average[::2] == recomputed[::2]
    assert average[1] != recomputed[1]
    again = weight_commands.interpolate(fresh, averaged.weights, points=2)
    assert columns(again.tables[0])["top-1"] == [top1[0], top1[-1]]


def test_other_networks_have_no_line(plain, experts):
    fresh = open_run(plain.folder)
    with pytest.raises(WeightsError, match="are of different networks"):
        weight_commands.interpolate(fresh, experts.folder)
    with pytest.raises(UserError, match="--points = 1 is not allowed"):
        weight_commands.interpolate(fresh, plain.folder, points=1)


def test_a_network_of_classes_in_another_order_is_refused(plain, averaged, tmp_path):
    content = torch.load(averaged.weights, weights_only=True)
    torch.save({**content, "classes": list(CLASSES[::-1])}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="label 0 is 'zebu' there and 'cat' here"):
        weight_commands.interpolate(plain, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="label 0 is 'zebu' there and 'cat' here"):
        open_run(plain.folder, weights=tmp_path / "other.pth")


def test_the_last_average_of_members_is_the_runs_result(averaged):
    fresh = open_run(averaged.folder)
    found = columns(weight_commands.members(fresh).tables[0])
    assert found["epochs"] == [f"{t * 16 / 179:.2f}" for t in (15, 30, 40)]
    assert float(found["average"][-1]) == near(final(averaged)["top1"])
    one, other, average = (float(found[x][0]) for x in ("member 1", "member 2", "average"))
    assert float(found["gain over the best"][0]) == near(average - max(one, other))
    files = snapshot_files(fresh.folder / "snapshots")
    states = [torch.load(files[39, member])["student"] for member in (0, 1)]
    names = [name for name, _ in fresh.model.named_parameters()]
    flat = [torch.cat([state[name].flatten().double() for name in names]) for state in states]
    assert float(found["distance"][-1]) == near(float((flat[0] - flat[1]).norm()))


def test_batch_norms_of_averages_can_be_re_estimated(averaged):
    fresh = open_run(averaged.folder)
    found = columns(weight_commands.members(fresh, bn="recompute", metric="g_mean").tables[0])
    assert len(found["average"]) == 3
    for metric in ("x", "loss"):  # a gain over the highest loss would be none
        with pytest.raises(UserError, match=rf"--metric {metric} is not allowed.* of top1,"):
            weight_commands.members(fresh, metric=metric)


def test_members_need_snapshots_that_are_whole(plain, tmp_path, averaged):
    with pytest.raises(UserError, match="snapshots of 0 members"):
        weight_commands.members(plain)
    path = averaged.folder / "snapshots" / "member1_t0000014.pth"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    try:
        with pytest.raises(CheckpointError, match=r"member1_t0000014\.pth cannot be read"):
            weight_commands.members(open_run(averaged.folder))
    finally:
        path.write_bytes(content)


def test_experts_together_are_the_runs_result(experts):
    found = commands.experts(experts)
    numbers = columns(found.tables[0])
    assert numbers[""] == ["expert 1", "expert 2", "all"]
    metrics = final(experts)
    expected = [metrics["expert1/top1"], metrics["expert2/top1"], metrics["top1"]]
    assert [float(x) for x in numbers["top-1"]] == near(expected)
    assert columns(found.tables[1])["experts"] == ["1 and 2"]


def test_one_network_has_no_experts(plain):
    with pytest.raises(UserError, match=r"has one network \(experts need CLS.MODEL.EXPERTS >= 2\)"):
        commands.experts(plain)


def test_every_subject_of_one_network_takes_experts(experts):
    for analyze in (commands.calibration, commands.confusion, commands.classes, commands.features):
        assert analyze(experts).figures
    decisions = columns(commands.tau(experts).tables[0])["decision"]
    assert decisions == [
        "as trained",
        "logit adjustment",
        "logit adjustment, expert 1",
        "logit adjustment, expert 2",
        "nearest class mean",
    ]


def test_decisions_begin_with_the_network(plain):
    found = commands.tau(plain)
    numbers = columns(found.tables[0])
    assert numbers["decision"][2] == "τ-normalized classifier"
    assert float(numbers["top-1"][0]) == near(final(plain)["top1"])
    curve = found.figures["tau.png"].axes[0].get_lines()[0]
    assert curve.get_xdata()[0] == 0
    assert curve.get_ydata()[0] == near(final(plain)["top1"])
    assert float(numbers["top-1"][1]) == near(curve.get_ydata().max())


def test_an_embedding_shows_so_many_images_of_so_many_classes(plain):
    found = columns(commands.embedding(plain, images=4, classes=3).tables[0])
    assert found["class"] == ["cat", "owl", "zebu"]
    assert found["test images"] == ["4", "4", "4"]
    with pytest.raises(UserError, match="--classes = 0 is not allowed"):
        commands.embedding(plain, classes=0)
    message = "with --images 1 --classes 2: 2 images are not allowed (must be at least 3)"
    with pytest.raises(UserError, match=re.escape(message)):
        commands.embedding(plain, images=1, classes=2)


def test_a_run_can_be_looked_at_with_other_weights_and_settings(plain, averaged):
    other = open_run(plain.folder, weights=averaged.weights, overrides=["TEST.IMS_PER_BATCH", "7"])
    numbers = dict(zip(*columns(commands.classes(other).tables[0]).values(), strict=True))
    assert float(numbers["top-1"]) == near(final(averaged)["top1"])


def test_a_detection_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("TASK: detection\n")
    with pytest.raises(UserError, match=r"is a run of detection \(must be one of classification\)"):
        open_run(tmp_path)
