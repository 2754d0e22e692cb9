import itertools

import numpy as np
import pytest
import torch

from ssod_imwa.classification.features import (
    class_means,
    expert_distances,
    extract,
    feature_deviation,
    unit_rows,
)
from ssod_imwa.classification.methods.base import TrainingNetwork


def test_features_and_logits_come_in_the_data_sets_order(toy):
    net = toy.net()
    images, labels = toy.images_and_labels()
    found = extract(net, toy.batches(images, labels))
    with torch.no_grad():
        for i in range(len(images)):  # one at a time: eval mode does not mix images
            features = net.features(images[i : i + 1])
            np.testing.assert_allclose(found.features[i], features[0], rtol=1e-4, atol=1e-5)
            logits = net.classifier(features)[0]
            np.testing.assert_allclose(found.logits[i], logits, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(found.mean_logits, found.logits)
    np.testing.assert_array_equal(found.joined_features, found.features)


class Network(TrainingNetwork):
    def outputs(self, images):
        return images


def test_a_methods_network_counts_as_what_it_deploys(toy):
    images, labels = toy.images_and_labels()
    plain = extract(toy.net(), toy.batches(images, labels))
    around = extract(Network(toy.net()).eval(), toy.batches(images, labels))
    np.testing.assert_array_equal(plain.logits, around.logits)


def test_experts_have_features_each_and_mean_logits(toy):
    model = toy.experts()
    images, labels = toy.images_and_labels()
    found = extract(model, toy.batches(images, labels))
    assert found.features.shape == (2, 10, 5)
    with torch.no_grad():
        mean = model(images).numpy()
        second = model.experts[1].features(images).numpy()
    np.testing.assert_allclose(found.mean_logits, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.joined_features[:, 5:], second, rtol=1e-4, atol=1e-5)


def test_the_loop_can_be_left(toy):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(toy.net(), toy.batches(*toy.images_and_labels()), poll=stop)


@pytest.fixture
def clouds():
    """Features of 7 + 3 + 4 training and 4 + 5 + 0 test images."""
    generator = np.random.default_rng(0)
    train_labels, test_labels = np.repeat([0, 1, 2], [7, 3, 4]), np.repeat([0, 1], [4, 5])
    return (
        generator.normal(size=(14, 6)),
        train_labels,
        generator.normal(size=(9, 6)),
        test_labels,
    )


def test_deviation_is_the_mean_over_all_subsets(clouds):
    train, train_labels, test, test_labels = clouds
    found = feature_deviation(*clouds, classes=3, generator=np.random.default_rng(1), draws=20_000)

    def unit(row):
        return row / np.sqrt(sum(x * x for x in row))

    for c in (0, 1):  # what the draws estimate, by enumeration
        target = np.mean([unit(x) for x in test[test_labels == c]], axis=0)
        own = [unit(x) for x in train[train_labels == c]]
        subsets = list(itertools.combinations(own, 3))  # K = 3, the smallest class
        exact = np.mean([np.linalg.norm(np.mean(s, axis=0) - target) for s in subsets])
        assert found[c] == pytest.approx(exact, abs=5e-3)
    assert np.isnan(found[2])  # no test image


def test_deviation_of_the_smallest_class_needs_no_draws(clouds):
    one, other = (
        feature_deviation(*clouds, classes=3, generator=np.random.default_rng(i), draws=5)
        for i in (1, 2)
    )
    assert one[1] == other[1]
    assert one[0] != other[0]


def test_subsets_are_drawn_without_replacement():
    # Two antipodal features: every subset of both has the mean 0, a repeated one has not.
    train = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    test = np.array([[0.0, 2.0]])
    labels = np.zeros(4, dtype=int)
    found = feature_deviation(
        train,
        labels,
        test,
        np.zeros(1, dtype=int),
        classes=1,
        generator=np.random.default_rng(0),
        subset=4,
    )
    assert found[0] == pytest.approx(1)
    single = feature_deviation(
        train,
        labels,
        test,
        np.zeros(1, dtype=int),
        classes=1,
        generator=np.random.default_rng(0),
        subset=1,
        draws=4000,
    )
    # Distances of single features to (0, 1): √2, √2, 0, 2.
    assert single[0] == pytest.approx((2 * 2**0.5 + 2) / 4, abs=0.05)


def test_a_subset_larger_than_a_class_is_refused(clouds):
    with pytest.raises(ValueError, match=r"subset = 4 is not allowed \(must be 1..3"):
        feature_deviation(*clouds, classes=3, generator=np.random.default_rng(0), subset=4)
    with pytest.raises(ValueError, match="draws = 0 is not allowed"):
        feature_deviation(*clouds, classes=3, generator=np.random.default_rng(0), draws=0)


def test_rows_of_zeros_stay():
    np.testing.assert_array_equal(
        unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]]
    )


def test_expert_distances_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(3, 8, 4)).astype(np.float32)
    labels = np.array([0, 1, 0, 1, 1, 0, 3, 3])
    found = expert_distances(features, labels, classes=4)
    assert list(found) == [(0, 1), (0, 2), (1, 2)]
    for (m, n), values in found.items():
        for c in (0, 1, 3):
            own = [
                sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5
                for x, y, label in zip(features[m], features[n], labels, strict=True)
                if label == c
            ]
            assert values[c] == pytest.approx(sum(own) / len(own))
        assert np.isnan(values[2])


def test_a_single_expert_has_no_distance():
    with pytest.raises(ValueError, match=r"features of shape \(5, 2\) are not allowed"):
        expert_distances(np.zeros((5, 2)), np.zeros(5, dtype=int), classes=1)


def test_class_means_of_no_images_are_nan():
    found = class_means(np.array([1.0, 2.0, 6.0]), np.array([0, 2, 2]), classes=3)
    np.testing.assert_array_equal(found, [1, np.nan, 4])
