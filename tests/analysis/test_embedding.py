import numpy as np
import pytest

from ssod_imwa.analysis.embedding import balanced_sample, spread_classes, tsne


def test_a_sample_has_equally_many_of_each_class_and_all_of_the_small_ones():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = balanced_sample(labels, 5, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.tolist() == sorted(chosen.tolist())


def test_every_image_can_be_drawn():
    labels = np.zeros(4, dtype=int)
    generator = np.random.default_rng(0)
    drawn = np.concatenate([balanced_sample(labels, 2, generator) for _ in range(400)])
    # 800 draws of 4 images: 200 each, with a deviation of about 10.
    assert np.bincount(drawn).min() > 150


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match=r"per_class = 0 is not allowed \(must be at least 1\)"):
        balanced_sample(np.array([0]), 0, np.random.default_rng(0))


def test_a_sample_of_no_images_is_empty():
    chosen = balanced_sample(np.zeros(0, dtype=int), 5, np.random.default_rng(0))
    assert (chosen.tolist(), chosen.dtype) == ([], np.int64)


def test_spread_classes_have_the_most_and_the_least_frequent_one():
    counts = np.array([10 * (i + 1) for i in range(100)])
    chosen = spread_classes(counts, 5)
    assert chosen.tolist() == [99, 74, 49, 25, 0]
    assert spread_classes(counts[:3], 5).tolist() == [2, 1, 0]


def test_clusters_stay_clusters():
    generator = np.random.default_rng(0)
    centers = 40 * np.eye(3, 8)
    labels = np.repeat(np.arange(3), 15)
    points = tsne(centers[labels] + generator.normal(size=(45, 8)), seed=0, perplexity=10)
    assert points.shape == (45, 2)
    # The nearest other image is of the same class.
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 45)
    assert (labels[distances.argmin(1)] == labels).all()


def test_few_images_lower_the_perplexity_and_too_few_are_refused():
    assert tsne(np.eye(5), seed=0).shape == (5, 2)
    assert np.isfinite(tsne(np.eye(3), seed=0)).all()
    for few in range(3):
        with pytest.raises(ValueError, match=f"{few} images are not allowed"):
            tsne(np.eye(2)[:few], seed=0)


@pytest.mark.parametrize(("value", "message"), [(1.0, "all the same"), (np.nan, "not finite")])
def test_features_that_tell_nothing_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        tsne(np.full((9, 4), value), seed=0)
