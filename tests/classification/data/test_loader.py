import random
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ssod_imwa.averaging.episodes import EpisodeSchedule
from ssod_imwa.classification.data.augmentation import CIFAR_STATISTICS
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.large_views import large_view
from ssod_imwa.classification.data.loader import (
    ImageBatch,
    build_image_batches,
    build_test_image_batches,
)
from ssod_imwa.classification.data.samplers import class_sampler
from ssod_imwa.classification.data.small_views import small_view
from ssod_imwa.data.image_files import read_image
from ssod_imwa.engine.seeding import counted_generator, seed_everything
from ssod_imwa.errors import DataError

CLASSES = ("a", "b", "c")
SCHEDULE = EpisodeSchedule(5, episodes=2, members=2)
BATCH = 4
VIEWS = [small_view(name, CIFAR_STATISTICS, size=8) for name in ("plain", "none", "plain")]


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


def source(dataset, member, batch_size=BATCH):
    return class_sampler(
        "instance", dataset.labels, 3, batch_size, seed=1, member=member, iterations=5
    )


def build(dataset, views=VIEWS, schedule=SCHEDULE, **settings):
    return build_image_batches(
        dataset, schedule, partial(source, dataset), views, **{"seed": 1, **settings}
    )


def large_views():
    return [large_view(name, size=16, jitter=True) for name in ("standard", "sim")]


def same(batches, expected):
    """Whether two lists of batches are equal bit by bit."""
    return len(batches) == len(expected) and all(
        len(a.views) == len(b.views)
        and all(x.equal(y) for x, y in zip(a.views, b.views, strict=True))
        and a.labels.equal(b.labels)
        and a.indices.equal(b.indices)
        for a, b in zip(batches, expected, strict=True)
    )


# ------------------------------------------------------------------------------------- in memory


def test_batches_are_what_sampler_and_counted_numbers_give():
    dataset = in_memory()
    batches = list(build(dataset, first_member=3)(0))
    assert len(batches) == len(SCHEDULE)
    for g, batch in enumerate(batches):
        position = SCHEDULE.position(g)
        member, t = 3 + position.member, position.t
        indices = torch.tensor(source(dataset, member).batch(t))
        assert batch.indices.equal(indices)
        assert batch.labels.equal(indices % 3)
        for number, view in enumerate(VIEWS):
            numbers = counted_generator(1, "view", number, member, t).random((4, view.numbers))
            expected = view(dataset.images[indices], torch.from_numpy(numbers))
            assert batch.views[number].equal(expected)
        assert not batch.views[0].equal(batch.views[2])


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


def test_seeds_get_different_views_of_the_same_images():
    one, two = (next(build(in_memory(), seed=seed)(0)) for seed in (1, 2))
    assert one.indices.equal(two.indices)
    assert one.views[1].equal(two.views[1])
    assert not one.views[0].equal(two.views[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_get_the_global_batch(world_size):
    whole = list(build(in_memory())(0))
    for rank in range(world_size):
        part = list(build(in_memory(), rank=rank, world_size=world_size)(0))
        expected = [batch.split(world_size)[rank] for batch in whole]
        assert same(part, expected)


def test_test_batches_give_every_image_once_in_order():
    dataset = in_memory()
    view = small_view("none", CIFAR_STATISTICS, size=8)
    batches = build_test_image_batches(dataset, view, batch_size=4)
    assert len(batches) == 3
    found = list(batches)
    assert torch.cat([batch.indices for batch in found]).equal(torch.arange(11))
    assert torch.cat([batch.labels for batch in found]).equal(dataset.labels)
    expected = view(dataset.images, torch.empty(11, 0))
    assert torch.cat([batch.views[0] for batch in found]).equal(expected)
    assert same(list(batches), found)
    ranks = [
        [
            batch.indices.tolist()
            for batch in build_test_image_batches(
                dataset, view, batch_size=4, rank=rank, world_size=2
            )
        ]
        for rank in range(2)
    ]
    assert ranks == [[[0, 2, 4, 6], [8, 10]], [[1, 3, 5, 7], [9]]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_in_memory_are_augmented_where_they_are_kept():
    here, there = list(build(in_memory())(0)), list(build(in_memory(), device="cuda")(0))
    assert all(view.is_cuda for batch in there for view in batch.views)
    for batch, expected in zip(there, here, strict=True):
        assert batch.indices.cpu().equal(expected.indices)
        for view, other in zip(batch.views, expected.views, strict=True):
            assert torch.allclose(view.cpu(), other, atol=1e-6)


# -------------------------------------------------------------------------------------- in files


def test_views_of_files_are_those_of_generators_seeded_for_the_slot(in_files):
    views = large_views()
    schedule = EpisodeSchedule(2, members=2)
    for g, batch in enumerate(build(in_files, views, schedule, first_member=5)(0)):
        position = schedule.position(g)
        member, t = 5 + position.member, position.t
        assert batch.indices.tolist() == source(in_files, member).batch(t)
        for slot, index in enumerate(batch.indices.tolist()):
            for number, view in enumerate(views):
                seed_everything(1, "view", number, member, t, slot)
                assert batch.views[number][slot].equal(view(read_image(in_files.files[index])))
        assert batch.labels.equal(batch.indices % 3)


def test_any_start_and_rank_get_their_part_of_files(in_files):
    schedule = EpisodeSchedule(2, members=2)
    whole = list(build(in_files, large_views(), schedule)(0))
    assert same(list(build(in_files, large_views(), schedule)(3)), whole[3:])
    part = list(build(in_files, large_views(), schedule, rank=1, world_size=2)(0))
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
        found += build(in_files, [Draws()], EpisodeSchedule(1))(0)
        assert Draws()(None).equal(expected)
    assert same(found[:1], found[1:])
    assert found[0].views[0].unique().numel() == 3 * BATCH


@pytest.mark.slow
def test_batches_of_files_do_not_depend_on_the_number_of_processes(in_files):
    # 224 pixels: sums over so many are taken by several threads where there are several.
    views = [large_view(name, jitter=True) for name in ("standard", "randcls", "livt", "sim")]
    here, there = (
        list(build(in_files, views, EpisodeSchedule(3), num_workers=n)(0)) for n in (0, 2)
    )
    assert same(here, there)
    view = large_view("test", jitter=False)
    here, there = (
        list(build_test_image_batches(in_files, view, batch_size=3, num_workers=n)) for n in (0, 2)
    )
    assert same(here, there)
    assert [batch.views[0].shape for batch in here] == [(3, 3, 224, 224)] * 2 + [(1, 3, 224, 224)]


def test_an_unreadable_image_stops_the_run_with_its_path(in_files, tmp_path):
    path = str(tmp_path / "broken.png")
    broken = replace(in_files, files=(*in_files.files[:3], path, *in_files.files[4:]))
    with pytest.raises(DataError, match=path):
        list(build(broken, large_views())(0))
    view = large_view("test", size=16, jitter=False)
    with pytest.raises(DataError, match=path):
        list(build_test_image_batches(broken, view, batch_size=3))


# ---------------------------------------------------------------------------------------- batches


def test_a_batch_is_split_by_slots():
    batch = ImageBatch((torch.arange(6), 10 * torch.arange(6)), torch.arange(6), torch.arange(6))
    parts = batch.split(3)
    assert [part.views[1].tolist() for part in parts] == [[0, 30], [10, 40], [20, 50]]
    assert [part.indices.tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="6 images cannot be split into 4 equal parts"):
        batch.split(4)
    moved = batch.to("meta")
    assert {x.device.type for x in (*moved.views, moved.labels, moved.indices)} == {"meta"}


# ----------------------------------------------------------------------------------------- errors


def test_what_cannot_be_trained_on_is_refused(in_files):
    with pytest.raises(DataError, match="memory has no images"):
        build(in_memory(0))
    with pytest.raises(ValueError, match="rank = 2 is not allowed"):
        build(in_memory(), rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch of 4 is not allowed on 3 processes"):
        build(in_memory(), world_size=3)
    with pytest.raises(ValueError, match=r"start = 11 is not allowed \(must be 0..10\)"):
        build(in_memory())(11)
    with pytest.raises(ValueError, match="no views are not allowed"):
        build(in_memory(), [])
    with pytest.raises(ValueError, match="type Compose is not allowed for memory"):
        build(in_memory(), large_views())
    with pytest.raises(ValueError, match="type PlainView is not allowed for files"):
        build(in_files, VIEWS)
    with pytest.raises(ValueError, match="PlainView is not allowed for testing"):
        build_test_image_batches(in_memory(), VIEWS[0], batch_size=2)
    with pytest.raises(ValueError, match="batch_size = 0 is not allowed"):
        build_test_image_batches(in_memory(), VIEWS[1], batch_size=0)
