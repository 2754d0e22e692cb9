import dataclasses

import numpy as np
import pytest
import torch

from ssod_imwa.classification.data.catalog import image_fingerprint, load_images, load_unlabeled
from ssod_imwa.classification.data.datasets import ClassificationDataset
from ssod_imwa.classification.data.feature_sets import (
    FeatureDataset,
    feature_view,
    read_features,
    write_features,
)
from ssod_imwa.classification.data.images import ImagesInMemory
from ssod_imwa.classification.data.splits import join_unlabeled, labeled_among
from ssod_imwa.data.streams import Step
from ssod_imwa.errors import DataError

CLASSES = ("cat", "dog")
WEAK, STRONG, WIDTH = 2, 3, 4


@pytest.fixture
def dataset():
    """12 cats and 6 dogs; a feature says its image, its view and its place."""
    labels = torch.tensor([0, 0, 1] * 6)
    image = torch.arange(18.0)[:, None, None]
    view = torch.arange(float(WEAK + STRONG))[:, None] / 8
    features = (image + view + torch.arange(float(WIDTH)) / 64).half()
    return FeatureDataset("toy", labels, CLASSES, images=features, weak=WEAK, source="net at 32 px")


@pytest.fixture
def written(dataset, tmp_path):
    made = {"source": dataset.source, "seed": 0}
    file = tmp_path / "toy.pt"
    write_features(file, dataset.images, dataset, weak=WEAK, made=made)
    return file


def test_a_file_gives_back_what_was_written(dataset, written):
    read = load_images("features:toy.pt", root=written.parent)
    assert torch.equal(read.images, dataset.images)
    assert torch.equal(read.labels, dataset.labels)
    assert (read.classes, read.weak, read.source) == (CLASSES, WEAK, dataset.source)
    assert (read.width, read.views) == (WIDTH, WEAK + STRONG)
    assert image_fingerprint(read) == image_fingerprint(dataset)


def test_every_fifth_image_of_a_class_is_held_out_and_the_others_are_not(written):
    fit, held_out = (read_features(written, name="x", part=p) for p in ("fit", "held_out"))
    assert (fit.counts, held_out.counts) == ([9, 4], [3, 2])
    # The first cats are images 0, 1, 3, 4, 6, 7, ...: the 1st, 6th and 11th are 0, 7 and 15.
    assert held_out.images[:, 0, 0].tolist() == [0, 2, 7, 15, 17]
    together = torch.cat([fit.images, held_out.images])[:, 0, 0].sort().values
    assert together.tolist() == list(range(18))


def test_unlabeled_features_keep_their_kind(written):
    unlabeled = load_unlabeled("features:toy.pt", root=written.parent, classes=CLASSES)
    assert isinstance(unlabeled, FeatureDataset)
    assert not unlabeled.is_labeled


def pick(name, dataset, *, seed=3, t=0, number=0, positions=(4, 0, 9, 9)):
    """The chosen view of each image, as its number."""
    views = {f"v{i}": feature_view("none", dataset) for i in range(number)}
    step = Step("unlabeled", seed, 1, t, len(positions), list(positions), range(len(positions)))
    part = ImagesInMemory(dataset).make(step, {**views, "chosen": feature_view(name, dataset)})
    chosen = part.views["chosen"]
    assert chosen.dtype == torch.float32
    features = dataset.images[list(positions)].float()
    same = (features == chosen[:, None]).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1).tolist()


def test_views_pick_rows_of_their_kind_by_counted_numbers(dataset):
    assert pick("none", dataset) == [0, 0, 0, 0]
    weak = [x for t in range(50) for x in pick("weak", dataset, t=t)]
    strong = [x for t in range(50) for x in pick("randaugment", dataset, t=t)]
    assert set(weak) == {0, 1}
    assert set(strong) == {2, 3, 4}
    # Uniform: 200 draws of three, 67 +- 7.
    assert all(45 < strong.count(row) < 90 for row in {2, 3, 4})
    again = [x for t in range(50) for x in pick("randaugment", dataset, t=t)]
    assert strong == again
    for change in ({"seed": 4}, {"number": 1}):
        other = [x for t in range(50) for x in pick("randaugment", dataset, t=t, **change)]
        assert strong != other


def test_an_image_twice_is_one_though_its_strong_views_differ(dataset):
    other = dataset.images.clone()
    other[:, 1:] += 1
    copied = dataclasses.replace(dataset, images=other)
    assert labeled_among(copied, dataset.subset([2, 5])).nonzero()[:, 0].tolist() == [2, 5]


@pytest.mark.parametrize("name", ["plain", "sim"])
def test_views_that_need_pixels_are_refused(dataset, name):
    with pytest.raises(ValueError, match=f"view '{name}' is not allowed for features"):
        feature_view(name, dataset)


def test_a_file_without_strong_views_has_none(dataset):
    tested = dataclasses.replace(dataset, images=dataset.images[:, :1], weak=1)
    assert pick("weak", tested) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="toy, which has no strong views"):
        feature_view("randaugment", tested)


def test_sets_of_other_networks_or_of_pixels_are_not_joined(dataset):
    other = dataclasses.replace(dataset, name="other", source="another net")
    with pytest.raises(DataError, match="toy have 5 views of 4 features by net at 32 px, those of"):
        join_unlabeled(dataset, other)
    pixels = ClassificationDataset(
        "pixels", torch.zeros(1, dtype=torch.int64), CLASSES, images=torch.zeros(1, 3, 8, 8)
    )
    with pytest.raises(DataError, match="those of pixels 8 x 8 pixels"):
        join_unlabeled(dataset, pixels)


def test_files_that_are_missing_damaged_or_of_another_kind_are_refused(written, tmp_path):
    with pytest.raises(DataError, match=r"features:no.pt: .*there is no such file"):
        load_images("features:no.pt", root=tmp_path)
    with pytest.raises(
        DataError, match=r"part 'other' is not known \(must be one of fit, held_out"
    ):
        load_images("features:toy.pt:other", root=tmp_path)
    torch.save({"model": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=r"weights.pt is no file of features"):
        load_images("features:weights.pt", root=tmp_path)
    content = written.read_bytes()
    written.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"features:toy\.pt: "):
        load_images("features:toy.pt", root=tmp_path)
    with pytest.raises(ValueError, match="6 weak views are not allowed"):
        FeatureDataset(
            *("x", torch.zeros(1, dtype=torch.int64), CLASSES),
            images=torch.from_numpy(np.zeros((1, 5, 2), np.float16)),
            weak=6,
        )
