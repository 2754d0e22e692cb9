import json

import numpy as np
import pytest
import torch
from torch import nn

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.imwa import IMWA
from ssod_imwa.classification.features import extract, feature_deviation
from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions
from ssod_imwa.classification.methods.base import Training
from ssod_imwa.classification.methods.erm import EmpiricalRisk
from ssod_imwa.classification.mixers import NoMixing
from ssod_imwa.classification.models.base import ImageClassifier
from ssod_imwa.classification.tracking import (
    ClassTrackingHook,
    SnapshotHook,
    snapshot_files,
    snapshot_path,
)
from ssod_imwa.config.options import Options
from ssod_imwa.data.batches import Batch, Part
from ssod_imwa.engine.checkpoint.atomic import damage, load_checkpoint
from ssod_imwa.engine.checkpoint.writing import CheckpointHook, resume
from ssod_imwa.engine.hooks import IMWAHook
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.engine.trainer import HookBase, Trainer

COUNTS = [6, 3, 2]
RUN = {"seed": 1, "config": ""}


class Net(ImageClassifier):
    group_names = ("stem",)

    def __init__(self):
        super().__init__()
        self.num_features = 4
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2))
        self.classifier = nn.Linear(4, 3)


def fixed_batches(purpose, counts):
    generator = counted_generator(purpose)
    labels = torch.from_numpy(np.repeat(np.arange(3), counts))
    images = torch.from_numpy(generator.normal(size=(len(labels), 3, 6, 6))).float()
    images += labels[:, None, None, None]
    at = torch.arange(len(labels))
    return [Part({"image": images[part]}, labels[part], part) for part in at.split(4)]


TRAIN, TEST = fixed_batches("train", COUNTS), fixed_batches("test", [3, 3, 3])


class Stop(HookBase):
    def __init__(self, at):
        self.at = at

    def after_step(self):
        self.trainer.stop_requested = self.trainer.iter == self.at


def build(
    folder, *, track=2, snapshots=2, stop=None, members=2, first_member=0, iterations=5, period=0
):
    """A trainer with IMWA and the hooks in the order of a run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    mixer = NoMixing(COUNTS, Options(), net)
    criterion = CrossEntropy(COUNTS, CrossEntropyOptions())
    method = EmpiricalRisk(net, criterion, training=Training(iterations), mixer=mixer)
    schedule = EpisodeSchedule(iterations, episodes=2, members=members)

    def batches(start):
        for g in range(start, len(schedule)):
            position = schedule.position(g)
            generator = counted_generator(1, first_member + position.member, position.t)
            images = torch.from_numpy(generator.normal(size=(4, 3, 6, 6))).float()
            labels = torch.from_numpy(generator.integers(3, size=4))
            yield Batch(labeled=Part({"image": images}, labels, torch.arange(4)))

    trainer = Trainer(
        method,
        schedule,
        batches,
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        seed=1,
        first_member=first_member,
    )
    imwa = IMWA(
        schedule,
        method.models(),
        optimizer=trainer.optimizer,
        member_state={"scaler": trainer.scaler, "method": method},
    )
    hooks = []
    if track:
        hooks.append(
            ClassTrackingHook(
                folder / "classes.json",
                TRAIN,
                TEST,
                classes=3,
                period=track,
                seed=1,
                first_member=first_member,
                draws=10,
            )
        )
    if snapshots:
        path = folder / "snapshots"
        hooks.append(SnapshotHook(path, period=snapshots, first_member=first_member))
    folder.mkdir(exist_ok=True)
    hooks += [IMWAHook(imwa), CheckpointHook(folder, run=RUN, period=period, keep=20)]
    trainer.register_hooks([*hooks, *([] if stop is None else [Stop(stop)])])
    return trainer


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def rows(folder):
    return [json.loads(line) for line in (folder / "classes.json").read_text().splitlines()]


def weights(trainer):
    return {name: x.clone() for name, x in trainer.method.student.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_member_has_rows_by_its_own_clock_and_one_at_its_end(tmp_path):
    build(tmp_path).train()
    found = [(row["member"], row["t"], row["episode"]) for row in rows(tmp_path)]
    # Episodes of the own iterations 0, 1 and 2, 3, 4.
    assert found == [(0, 1, 0), (1, 1, 0), (0, 3, 1), (0, 4, 1), (1, 3, 1), (1, 4, 1)]
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 3, 5, 6, 8, 9]


def test_rows_are_of_the_member_before_it_is_averaged(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    row = rows(tmp_path)[3]
    assert (row["member"], row["t"]) == (0, 4)
    member = Net()
    snapshot = load_checkpoint(snapshot_path(tmp_path / "snapshots", 0, 4))
    member.load_state_dict(snapshot["student"])
    assert (snapshot["member"], snapshot["t"]) == (0, 4)
    member.eval()
    images = torch.cat([part.views["image"] for part in TRAIN])
    labels = torch.cat([part.targets for part in TRAIN])
    with torch.no_grad():
        weight, bias = (x.double() for x in member.classifier.parameters())
        logits = member.features(images).double() @ weight.T + bias
    predictions = logits.argmax(1)
    errors = logits.softmax(1) - nn.functional.one_hot(labels, 3)
    norms = (errors @ weight).norm(dim=1)
    train, test = (extract(member, batches) for batches in (TRAIN, TEST))
    deviation = feature_deviation(
        train.features,
        train.labels,
        test.features,
        test.labels,
        classes=3,
        generator=counted_generator(1, "deviation", 0, 4),
        draws=10,
    )
    for c in range(3):
        own = labels == c
        assert row["accuracy"][c] == pytest.approx(
            float((predictions[own] == c).double().mean()), rel=1e-5
        )
        assert row["gradient_norm"][c] == pytest.approx(float(norms[own].mean()), rel=1e-4)
        assert row["ratio"][c] == pytest.approx(int((predictions == c).sum()) / COUNTS[c], rel=1e-5)
        assert row["deviation"][c] == pytest.approx(deviation[c], rel=1e-4)


def test_a_watched_run_is_the_same_run(tmp_path):
    watched, plain = build(tmp_path / "a"), build(tmp_path / "b", track=0, snapshots=0)
    for trainer in (watched, plain):
        trainer.train()
    assert same(weights(watched), weights(plain))
    assert watched.method.student.training
    assert not (tmp_path / "b" / "classes.json").exists()


@pytest.mark.parametrize("stop", [0, 3, 5, 6])
def test_a_resumed_run_neither_repeats_nor_loses_rows(tmp_path, stop):
    build(tmp_path / "whole").train()
    folder = tmp_path / "parts"
    build(folder, stop=stop, period=stop + 1).train()
    # What a killed run wrote after its last checkpoint, half a line included.
    with (folder / "classes.json").open("a") as file:
        file.write('{"iteration": 99}\n{"itera')
    trainer = build(folder)
    resume(trainer, folder, RUN)
    trainer.train()
    assert rows(folder) == rows(tmp_path / "whole")
    for place, path in snapshot_files(tmp_path / "whole" / "snapshots").items():
        other = load_checkpoint(snapshot_files(folder / "snapshots")[place])
        assert same(load_checkpoint(path)["student"], other["student"])


def test_going_back_to_an_earlier_checkpoint_drops_later_rows(tmp_path):
    build(tmp_path, period=6).train()
    complete = rows(tmp_path)
    trainer = build(tmp_path)
    resume(trainer, tmp_path / "model_0000005.pth", RUN)
    trainer.train()
    assert rows(tmp_path) == complete


def test_a_new_run_replaces_rows_and_snapshots(tmp_path):
    build(tmp_path).train()
    for path in tmp_path.glob("model_*"):
        path.unlink()
    build(tmp_path, iterations=3, members=1).train()
    assert [row["t"] for row in rows(tmp_path)] == [1, 2]
    assert list(snapshot_files(tmp_path / "snapshots")) == [(1, 0), (2, 0)]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [
        f"member0_t000000{t}.pth{end}" for t in (1, 2) for end in ("", ".json")
    ]


def test_snapshots_are_of_the_members_own_numbers_and_intact(tmp_path):
    build(tmp_path, first_member=3).train()
    files = snapshot_files(tmp_path / "snapshots")
    assert list(files) == [(1, 3), (1, 4), (3, 3), (3, 4), (4, 3), (4, 4)]
    assert all(damage(path) is None for path in files.values())
    states = [load_checkpoint(files[1, member])["student"] for member in (3, 4)]
    assert not same(*states)


def test_classes_without_images_are_null(tmp_path):
    trainer = build(tmp_path, iterations=2, members=1)
    hook = next(hook for hook in trainer.hooks if isinstance(hook, ClassTrackingHook))
    hook._classes = 4
    trainer.train()
    for name in ("accuracy", "gradient_norm", "ratio", "deviation"):
        assert rows(tmp_path)[0][name][3] is None


def test_a_period_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"period = 0 is not allowed \(must be at least 1\)"):
        SnapshotHook(tmp_path, period=0)
    with pytest.raises(ValueError, match="period = 0 is not allowed"):
        ClassTrackingHook(tmp_path / "x", TRAIN, TEST, classes=3, period=0, seed=1)
