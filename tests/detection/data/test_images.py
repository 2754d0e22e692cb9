import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.data import workers
from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.loader import build_test_batches, build_train_batches
from ssod_imwa.data.order import BatchStream
from ssod_imwa.data.streams import On, Stream
from ssod_imwa.data.workers import LoaderError
from ssod_imwa.detection.data.images import DetectionImages, orientation_groups
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, ImageRecord
from ssod_imwa.detection.data.views import StrongView, TestView, WeakView, make_record_views
from ssod_imwa.engine.seeding import counted_generator
from ssod_imwa.errors import DataError

SCHEDULE = EpisodeSchedule(4, episodes=2, members=2)
SHAPES = [(40, 30), (30, 40), (32, 24)]


def write_dataset(folder, n, *, name="tiny", labeled=True):
    generator = np.random.default_rng(0)
    records = []
    for i in range(n):
        width, height = SHAPES[i % len(SHAPES)]
        path = folder / f"{name}{i}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        annotations = Annotations(
            np.array([[2, 3, 20, 21], [5, 5, 9, 9]], np.float32),
            np.array([i % 3, 1]),
            np.array([False, i % 2 == 0]),
            np.zeros(2, bool),
        )
        records.append(ImageRecord(str(path), i, width, height, annotations if labeled else None))
    return DetectionDataset(name, tuple(records), ("a", "b", "c"))


@pytest.fixture
def labeled(tmp_path):
    return write_dataset(tmp_path, 7)


@pytest.fixture
def unlabeled(tmp_path):
    return write_dataset(tmp_path, 9, name="more", labeled=False)


VIEWS = {"weak": WeakView([24, 32], 64), "strong": On("weak", StrongView())}


def build(labeled, unlabeled=None, schedule=SCHEDULE, *, views=VIEWS, sizes=(2, 4), **settings):
    """Batches as a run makes them of labeled and, if given, unlabeled images."""
    images = {"labeled": DetectionImages.labeled(labeled)}
    if unlabeled is not None:
        images["unlabeled"] = DetectionImages.unlabeled(unlabeled)
    streams = [
        Stream(name, x, partial(BatchStream, orientation_groups(x.records)), size, views)
        for (name, x), size in zip(images.items(), sizes, strict=False)
    ]
    return build_train_batches(streams, schedule, **{"seed": 1, **settings})


def flat(batches):
    """Everything in the batches as a nested list that `==` compares bit by bit."""

    def listed(view):
        targets = view.targets and (view.targets.boxes.tolist(), view.targets.labels.tolist())
        return view.image.tolist(), view.matrix.tolist(), targets

    return [
        {
            name: [
                (index, listed(weak), listed(strong))
                for index, weak, strong in zip(
                    part.indices.tolist(), part.views["weak"], part.views["strong"], strict=True
                )
            ]
            for name, part in batch.items()
        }
        for batch in batches
    ]


# ------------------------------------------------------------------------------ training batches


@pytest.mark.parametrize(("name", "hashed"), [("labeled", "labelled"), ("unlabeled", "unlabelled")])
def test_batches_are_what_the_order_and_counted_generators_give(labeled, unlabeled, name, hashed):
    data, size = {"labeled": (labeled, 2), "unlabeled": (unlabeled, 4)}[name]
    batches = list(build(labeled, unlabeled, first_member=3)(0))
    assert len(batches) == len(SCHEDULE)
    groups = orientation_groups(data.records)
    for g, batch in enumerate(batches):
        position = SCHEDULE.position(g)
        member, t = 3 + position.member, position.t
        order = BatchStream(groups, size, seed=1, member=member, kind=name)
        assert batch[name].indices.tolist() == order.batch(t)
        for slot, index in enumerate(order.batch(t)):
            generator = counted_generator(1, "views", hashed, member, t, slot)
            expected = make_record_views(data.records[index], VIEWS, generator)
            for view in ("weak", "strong"):
                made = batch[name].views[view][slot]
                assert torch.equal(made.image, expected[view].image)
                assert torch.equal(made.matrix, expected[view].matrix)


def test_a_view_that_is_not_read_does_not_change_the_others(labeled):
    both = list(build(labeled)(0))
    weak_alone = list(build(labeled, views={"weak": VIEWS["weak"]})(0))
    for batch, other in zip(both, weak_alone, strict=True):
        assert list(other["labeled"].views) == ["weak"]
        for view, same in zip(
            batch["labeled"].views["weak"], other["labeled"].views["weak"], strict=True
        ):
            assert torch.equal(view.image, same.image)


def test_any_start_continues_the_same_batches(labeled, unlabeled):
    batches = build(labeled, unlabeled)
    whole = flat(batches(0))
    for start in range(len(SCHEDULE) + 1):
        assert flat(batches(start)) == whole[start:]


def test_members_and_seeds_get_different_batches(labeled, unlabeled):
    schedule = EpisodeSchedule(3, members=2)
    batches = flat(build(labeled, unlabeled, schedule)(0))
    other = flat(build(labeled, unlabeled, schedule, seed=2)(0))
    assert batches[:3] != batches[3:]
    assert all(a != b for a, b in zip(batches, other, strict=True))


def test_a_member_as_a_run_of_its_own_gets_the_same_batches(labeled, unlabeled):
    both = flat(build(labeled, unlabeled, EpisodeSchedule(3, members=2))(0))
    alone = flat(build(labeled, unlabeled, EpisodeSchedule(3), first_member=1)(0))
    assert alone == both[3:]


def test_ranks_together_get_the_global_batch(labeled, unlabeled):
    whole = flat(build(labeled, unlabeled)(0))
    parts = [flat(build(labeled, unlabeled, processes=Group(r, 2))(0)) for r in range(2)]
    for step, zero, one in zip(whole, *parts, strict=True):
        for name in ("labeled", "unlabeled"):
            assert zero[name] == step[name][0::2]
            assert one[name] == step[name][1::2]


def test_groups_are_wide_and_other():
    shapes = [(4, 3), (3, 4), (3, 3), (9, 1)]
    items = [ImageRecord("", i, *shape) for i, shape in enumerate(shapes)]
    assert [group.tolist() for group in orientation_groups(items)] == [[0, 3], [1, 2]]
    assert [group.tolist() for group in orientation_groups(items[1:3])] == [[0, 1]]


def test_batches_hold_one_orientation(labeled, unlabeled):
    for batch in build(labeled, unlabeled)(0):
        for part in batch.values():
            assert len({v.image.shape[2] > v.image.shape[1] for v in part.views["weak"]}) == 1


def test_annotations_of_unlabeled_images_are_hidden(labeled):
    for batch in build(labeled, labeled)(0):
        for view in ("weak", "strong"):
            assert all(x.targets is None for x in batch["unlabeled"].views[view])
            assert all(len(x.targets) >= 1 for x in batch["labeled"].views[view])


def test_global_generators_are_left_alone(labeled, unlabeled):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    list(build(labeled, unlabeled)(0))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_data_sets_that_cannot_be_trained_on_are_refused(labeled, unlabeled):
    empty = replace(labeled, records=())
    with pytest.raises(DataError, match="tiny has no images"):
        build(empty)
    with pytest.raises(DataError, match=r"more0\.png of more has no annotations"):
        build(unlabeled)


# ----------------------------------------------------------------------------- unreadable images


def damage(dataset, index):
    path = dataset.records[index].file_name
    with open(path, "wb") as file:
        file.write(b"no image")
    return path


def test_an_unreadable_image_stops_the_run_with_its_path(labeled, unlabeled):
    path = damage(unlabeled, 4)
    with pytest.raises(DataError, match=path):
        list(build(labeled, unlabeled, EpisodeSchedule(9))(0))


def test_skip_puts_another_image_of_the_same_orientation_in_place(labeled, unlabeled, caplog):
    schedule = EpisodeSchedule(12, episodes=3, members=2)
    expected = flat(build(labeled, unlabeled, schedule)(0))
    path = damage(unlabeled, 4)
    batches = build(labeled, unlabeled, schedule, on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        result = flat(batches(0))
        list(batches(5))
    replaced = 0
    for before, after in zip(expected, result, strict=True):
        assert after["labeled"] == before["labeled"]
        for old, new in zip(before["unlabeled"], after["unlabeled"], strict=True):
            if old[0] != 4:
                assert new == old
                continue
            record = unlabeled.records[new[0]]
            assert record.width < record.height
            assert new[0] != 4
            replaced += 1
    assert replaced > 2
    assert [path in record.message for record in caplog.records] == [True]


def test_unreadable_images_are_counted_instead_of_named_one_by_one(labeled, unlabeled, caplog):
    batches = build(labeled, unlabeled, EpisodeSchedule(3), on_bad_record="skip")
    batches._report([f"{i}.png cannot be read" for i in range(61)])
    batches._report([f"{i}.png cannot be read" for i in range(61)])
    assert [line.partition(";")[0] for line in caplog.messages] == [
        "0.png cannot be read",
        "10 images cannot be read, this is the last: 9.png cannot be read",
    ]


def test_skip_gives_up_when_nothing_can_be_read(labeled):
    for i in range(len(labeled)):
        os.remove(labeled.records[i].file_name)
    with pytest.raises(DataError, match="10 labeled images in a row cannot be read"):
        next(build(labeled, on_bad_record="skip")(0))


# -------------------------------------------------------------------------------------- processes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(labeled, unlabeled, num_workers):
    damage(unlabeled, 4)
    settings = {"schedule": EpisodeSchedule(8, episodes=2, members=2), "on_bad_record": "skip"}
    here = flat(build(labeled, unlabeled, **settings)(0))
    batches = build(labeled, unlabeled, num_workers=num_workers, **settings)
    state = torch.random.get_rng_state()
    assert flat(batches(0)) == here
    assert flat(batches(11)) == here[11:]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_errors_of_processes_are_those_of_this_one(labeled, unlabeled):
    damage(unlabeled, 4)
    messages = []
    for num_workers in (0, 2):
        with pytest.raises(DataError) as caught:
            list(build(labeled, unlabeled, EpisodeSchedule(9), num_workers=num_workers)(0))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_a_dead_process_is_a_clear_error(labeled):
    others = multiprocessing.active_children()
    batches = build(labeled, schedule=EpisodeSchedule(1000), num_workers=1)(0)
    next(batches)
    (process,) = (p for p in multiprocessing.active_children() if p not in others)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"has died.*DATALOADER\.NUM_WORKERS") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Broken:
    """A weak view with a bug."""

    def __call__(self, image, generator):
        raise OSError("a bug")


def test_errors_of_our_own_are_not_taken_for_a_death(labeled):
    with pytest.raises(OSError, match=r"^a bug$"):
        next(build(labeled, views={"weak": Broken()})(0))
    passed_on = "Caught {} in DataLoader worker process 0.\nOriginal Traceback: a bug"
    assert not workers._tells_of_death(OSError(passed_on.format("OSError")))
    assert not workers._tells_of_death(RuntimeError(passed_on.format("RuntimeError")))
    assert workers._tells_of_death(ConnectionResetError())


SCRIPT = """
import signal, sys, time
from test_images import build, write_dataset
from ssod_imwa.averaging.episodes import EpisodeSchedule
from pathlib import Path

if __name__ == "__main__":
    data = write_dataset(Path(sys.argv[1]), 7)
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    batches = build(data, schedule=EpisodeSchedule(40), num_workers=2)
    left_over = batches(0)
    count = 0
    for batch in batches(0):
        count += 1
        if count == 3:
            next(left_over)
            print("ready", flush=True)
            while not received:
                time.sleep(0.01)
    print(*received, count, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_outlive_signals_to_the_group_but_not_this_process(tmp_path, number):
    with start_script(tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, number)
        # Returns when all processes have closed the pipes.
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.split()) == (0, [str(int(number)), "40"]), errors


@pytest.mark.slow
def test_processes_end_when_this_one_is_killed(tmp_path):
    with start_script(tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.communicate(timeout=120)  # raises unless all of them close the pipes


def start_script(folder):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, str(script), str(folder)]
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)


@pytest.mark.slow
def test_large_batches_need_few_open_files(labeled, unlabeled):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    batches = build(labeled, unlabeled, sizes=(2, 256), num_workers=2)
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 60, hard))
    try:
        kept = list(islice(batches(0), 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(batch["unlabeled"]) for batch in kept] == [256] * 4


# ------------------------------------------------------------------------------------ test images


def read(batches):
    return [
        (
            part.indices.tolist(),
            [(x.image.tolist(), x.matrix.tolist()) for x in part.views["image"]],
        )
        for part in batches
    ]


def test_test_images_are_resized_with_their_matrix_and_without_labels(labeled):
    batches = build_test_batches(DetectionImages.unlabeled(labeled), TestView(60, 80), batch_size=3)
    parts = list(batches)
    assert [part.indices.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    view = parts[0].views["image"][0]
    expected, matrix = TestView(60, 80)(read_image(labeled.records[0].file_name))
    assert torch.equal(view.image, expected)
    assert torch.equal(view.matrix, matrix)
    assert view.targets is None
    assert read(batches) == read(batches), "a second pass is the same"


def test_an_unreadable_test_image_is_an_error(labeled):
    path = damage(labeled, 2)
    images = DetectionImages.unlabeled(labeled)
    with pytest.raises(DataError, match=path):
        list(build_test_batches(images, TestView(30, 40), batch_size=2))


@pytest.mark.slow
def test_test_batches_do_not_depend_on_the_number_of_processes(labeled):
    images = DetectionImages.unlabeled(labeled)
    one, two = (
        read(build_test_batches(images, TestView(30, 40), batch_size=2, num_workers=n))
        for n in (0, 2)
    )
    assert one == two


def test_worker_context_does_not_fork_this_process():
    assert workers._context(["ssod_imwa.detection.data.images"]).get_start_method() in (
        "forkserver",
        "spawn",
    )
