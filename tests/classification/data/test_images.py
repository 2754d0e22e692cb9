import random
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.averaging.ranks import Group
from ssod_imwa.classification.data.augmentation import CIFAR_STATISTICS
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.images import open_images
from ssod_imwa.classification.data.large_views import large_view
from ssod_imwa.classification.data.samplers import class_sampler
from ssod_imwa.classification.data.small_views import small_view
from ssod_imwa.data.image_files import read_image
from ssod_imwa.data.loader import build_test_batches, build_train_batches
from ssod_imwa.data.streams import Stream
from ssod_imwa.engine.seeding import counted_generator, seed_everything
from ssod_imwa.errors import DataError

CLASSES = ("a", "b", "c")
SCHEDULE = EpisodeSchedule(5, episodes=2, members=2)
BATCH = 4
VIEWS = {
    name: small_view(recipe, CIFAR_STATISTICS, size=8)
    for name, recipe in (("image", "plain"), ("still", "none"), ("key", "plain"))
}


def in_memory(count=11):
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
    return ClassificationDataset("memory", torch.arange(count) % 3, CLASSES, images=images)


@pytest.fixture(scope="module")
def in_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    files = []
    for i in range(7):
        pixels = generator.integers(0, 256, (230 + i, 250, 3), dtype=np.uint8)
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels).save(files[-1], compress_level=0)
    return ClassificationDataset("files", torch.arange(7) % 3, CLASSES, files=tuple(files))


def sampler(dataset, member):
    return class_sampler("instance", dataset.labels, 3, BATCH, seed=1, member=member, iterations=5)


def stream(dataset, views, name="labeled", device="cpu"):
    order = partial(class_sampler, "instance", dataset.labels, 3, iterations=5)
    return Stream(name, open_images(dataset, device), order, BATCH, views)


def build(dataset, views=VIEWS, schedule=SCHEDULE, *, device="cpu", **settings):
    """The parts of a run with one stream."""
    streams = [stream(dataset, views, device=device)]
    batches = build_train_batches(streams, schedule, **{"seed": 1, **settings})
    return lambda start: (batch["labeled"] for batch in batches(start))


def large_views():
    return {
        name: large_view(recipe, size=16, jitter=True)
        for name, recipe in (("image", "standard"), ("key", "sim"))
    }


def same(parts, expected):
    """Whether two lists of parts are equal bit by bit."""
    return len(parts) == len(expected) and all(
        a.views.keys() == b.views.keys()
        and all(a.views[name].equal(b.views[name]) for name in a.views)
        and a.targets.equal(b.targets)
        and a.indices.equal(b.indices)
        for a, b in zip(parts, expected, strict=True)
    )


# ------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_batches_are_what_sampler_and_counted_numbers_give(name):
    dataset = in_memory()
    streams = [stream(dataset, VIEWS, name)]
    batches = list(build_train_batches(streams, SCHEDULE, seed=1, first_member=3)(0))
    assert len(batches) == len(SCHEDULE)
    order = partial(class_sampler, "instance", dataset.labels, 3, BATCH, iterations=5)
    more = [] if name == "labeled" else [name]  # runs of one stream stay as they were
    for g, batch in enumerate(batches):
        part, position = batch[name], SCHEDULE.position(g)
        member, t = 3 + position.member, position.t
        indices = torch.tensor(order(seed=1, member=member, kind=name).batch(t))
        assert part.indices.equal(indices)
        assert part.targets.equal(indices % 3)
        for number, (view_name, view) in enumerate(VIEWS.items()):
            counts = (1, "view", *more, number, member, t)
            numbers = counted_generator(*counts).random((4, view.numbers))
            expected = view(dataset.images[indices], torch.from_numpy(numbers))
            assert part.views[view_name].equal(expected)
        assert not part.views["image"].equal(part.views["key"])


def test_any_start_continues_the_same_batches():
    batches = build(in_memory())
    whole = list(batches(0))
    for start in range(len(SCHEDULE) + 1):
        assert same(list(batches(start)), whole[start:])


def test_a_member_as_a_run_of_its_own_gets_the_same_batches():
    both = list(build(in_memory(), schedule=EpisodeSchedule(3, members=2))(0))
    alone = list(build(in_memory(), schedule=EpisodeSchedule(3), first_member=1)(0))
    assert same(alone, both[3:])
    assert not same(both[:3], both[3:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_get_the_global_batch(world_size):
    whole = list(build(in_memory())(0))
    for rank in range(world_size):
        part = list(build(in_memory(), processes=Group(rank, world_size))(0))
        expected = [batch.split(world_size)[rank] for batch in whole]
        assert same(part, expected)


def test_test_images_are_normalized_alone():
    dataset, view = in_memory(), VIEWS["still"]
    parts = list(build_test_batches(open_images(dataset, "cpu"), view, batch_size=4))
    assert torch.cat([part.indices for part in parts]).equal(torch.arange(11))
    assert torch.cat([part.targets for part in parts]).equal(dataset.labels)
    expected = view(dataset.images, torch.empty(11, 0))
    assert torch.cat([part.views["image"] for part in parts]).equal(expected)


def test_random_views_are_not_for_testing():
    batches = build_test_batches(open_images(in_memory(), "cpu"), VIEWS["image"], batch_size=2)
    with pytest.raises(ValueError, match="PlainView is not allowed for testing"):
        next(iter(batches))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_in_memory_are_augmented_where_they_are_kept():
    here, there = list(build(in_memory())(0)), list(build(in_memory(), device="cuda")(0))
    assert all(view.is_cuda for part in there for view in part.views.values())
    for part, expected in zip(there, here, strict=True):
        assert part.indices.cpu().equal(expected.indices)
        for name, view in part.views.items():
            assert torch.allclose(view.cpu(), expected.views[name], atol=1e-6)


# -------------------------------------------------------------------------------------- in files


def test_views_of_files_are_those_of_generators_seeded_for_the_slot(in_files):
    views = large_views()
    schedule = EpisodeSchedule(2, members=2)
    for g, batch in enumerate(build(in_files, views, schedule, first_member=5)(0)):
        position = schedule.position(g)
        member, t = 5 + position.member, position.t
        assert batch.indices.tolist() == sampler(in_files, member).batch(t)
        for slot, index in enumerate(batch.indices.tolist()):
            for number, (name, view) in enumerate(views.items()):
                seed_everything(1, "view", number, member, t, slot)
                assert batch.views[name][slot].equal(view(read_image(in_files.files[index])))
        assert batch.targets.equal(batch.indices % 3)


def test_streams_of_the_same_files_get_views_of_their_own(in_files):
    streams = [stream(in_files, large_views(), name) for name in ("labeled", "unlabeled")]
    (batch,) = build_train_batches(streams, EpisodeSchedule(1), seed=1)(0)
    part = batch["unlabeled"]
    for slot, index in enumerate(part.indices.tolist()):
        for number, (name, view) in enumerate(large_views().items()):
            seed_everything(1, "view", "unlabeled", number, 0, 0, slot)
            assert part.views[name][slot].equal(view(read_image(in_files.files[index])))
    assert not batch["labeled"].views["image"].equal(part.views["image"])


def test_any_start_and_rank_get_their_part_of_files(in_files):
    schedule = EpisodeSchedule(2, members=2)
    whole = list(build(in_files, large_views(), schedule)(0))
    assert same(list(build(in_files, large_views(), schedule)(3)), whole[3:])
    part = list(build(in_files, large_views(), schedule, processes=Group(1, 2))(0))
    assert same(part, [batch.split(2)[1] for batch in whole])


@dataclass(frozen=True)
class Draws:
    """Not an image, but one number of each library's generator."""

    def __call__(self, image):
        return torch.tensor([random.random(), np.random.random(), float(torch.rand(()))])


def test_global_generators_are_left_alone_and_do_not_matter(in_files):
    found = []
    for seed in (1, 2):
        seed_everything(seed)
        expected = Draws()(None)
        seed_everything(seed)
        found += build(in_files, {"image": Draws()}, EpisodeSchedule(1))(0)
        assert Draws()(None).equal(expected)
    assert same(found[:1], found[1:])
    assert found[0].views["image"].unique().numel() == 3 * BATCH


@pytest.mark.slow
def test_batches_of_files_do_not_depend_on_the_number_of_processes(in_files):
    # 224 pixels: sums over so many are taken by several threads where there are several.
    names = ("standard", "randcls", "livt", "sim")
    views = {name: large_view(name, jitter=True) for name in names}
    here, there = (
        list(build(in_files, views, EpisodeSchedule(3), num_workers=n)(0)) for n in (0, 2)
    )
    assert same(here, there)
    images, view = open_images(in_files, "cpu"), large_view("test", jitter=False)
    here, there = (
        list(build_test_batches(images, view, batch_size=3, num_workers=n)) for n in (0, 2)
    )
    assert same(here, there)
    shapes = [part.views["image"].shape for part in here]
    assert shapes == [(3, 3, 224, 224)] * 2 + [(1, 3, 224, 224)]


def test_an_unreadable_image_stops_the_run_with_its_path(in_files, tmp_path):
    path = str(tmp_path / "broken.png")
    broken = replace(in_files, files=(*in_files.files[:3], path, *in_files.files[4:]))
    with pytest.raises(DataError, match=path):
        list(build(broken, large_views())(0))
    view = large_view("test", size=16, jitter=False)
    with pytest.raises(DataError, match=path):
        list(build_test_batches(open_images(broken, "cpu"), view, batch_size=3))


@pytest.mark.parametrize("strategy", ["instance", "class", "square_root"])
def test_skip_puts_another_image_in_place(in_files, tmp_path, strategy):
    broken = replace(in_files, files=(*in_files.files[:3], str(tmp_path), *in_files.files[4:]))
    order = partial(class_sampler, strategy, broken.labels, 3, iterations=5)
    views = {"image": large_view("test", size=16, jitter=False)}
    streams = [Stream("labeled", open_images(broken, "cpu"), order, BATCH, views)]
    batches = list(build_train_batches(streams, SCHEDULE, seed=1, on_bad_record="skip")(0))
    orders = [order(BATCH, seed=1, member=member, kind="labeled") for member in range(2)]
    replaced = 0
    for g, batch in enumerate(batches):
        position, part = SCHEDULE.position(g), batch["labeled"]
        for slot, index in enumerate(orders[position.member].batch(position.t)):
            if index == 3:
                replaced += 1
                assert part.targets[slot] == 0 or strategy == "instance"
                order = orders[position.member]
                others = (order.successor(position.t, slot, steps) for steps in range(1, 9))
                index = next(other for other in others if other != 3)
            assert part.indices[slot] == index
    assert replaced > 1


def test_a_data_set_without_images_is_refused():
    with pytest.raises(DataError, match="memory has no images"):
        build(in_memory(0))
