import numpy as np
import pytest
import torch
from scipy.stats import gmean, hmean
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import nn

from ssod_imwa.analysis.post_hoc import (
    accuracies,
    adjustment_sweep,
    nearest_mean_scores,
    tau_norm_sweep,
)

COUNTS = [500, 50, 5]


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=60)
    logits = generator.normal(size=(60, 3)) + 1.5 * np.eye(3)[labels] + np.array([1.5, 0, -1.5])
    return logits, labels


def test_accuracies_are_those_of_scikit_learn_and_scipy(scored):
    logits, labels = scored
    found = accuracies(logits, labels, train_counts=COUNTS)
    predictions = logits.argmax(1)
    recalls = [float((predictions[labels == c] == c).mean()) for c in range(3)]
    assert found["top1"] == pytest.approx(accuracy_score(labels, predictions))
    assert (found["many"], found["medium"], found["few"]) == pytest.approx(tuple(recalls))
    assert np.mean(recalls) == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert found["h_mean"] == pytest.approx(hmean(recalls))
    assert found["g_mean"] == pytest.approx(gmean(recalls))


def test_adjustment_by_the_prior_gives_the_decisions_under_a_uniform_one():
    generator = np.random.default_rng(0)
    likelihood = generator.random((200, 3))  # p(x | y)
    joint = likelihood * COUNTS
    logits = np.log(joint / joint.sum(1, keepdims=True))  # what cross-entropy learns
    found = adjustment_sweep(logits, likelihood.argmax(1), [0, 1], train_counts=COUNTS)
    assert found["top1"][0] < 0.9
    assert found["top1"][1] == 1


def test_the_sweep_of_adjustments_begins_with_the_network_and_helps_rare_classes(scored):
    logits, labels = scored
    found = adjustment_sweep(logits, labels, [0, 0.5, 1], train_counts=COUNTS)
    assert {name: x[0] for name, x in found.items()} == accuracies(
        logits, labels, train_counts=COUNTS
    )
    assert found["few"][0] < found["few"][2]
    assert found["many"][0] > found["many"][2]
    one = accuracies(logits - 0.5 * np.log(COUNTS), labels, train_counts=COUNTS)
    assert {name: x[1] for name, x in found.items()} == one


def test_the_sweep_of_norms_is_that_of_a_loop_over_classes(scored):
    _, labels = scored
    generator = np.random.default_rng(1)
    features = generator.normal(size=(60, 4)).astype(np.float32)
    classifier = nn.Linear(4, 3)
    with torch.no_grad():
        classifier.weight.mul_(torch.tensor([[5.0], [1.0], [0.2]]))
    weight = classifier.weight.detach().double().numpy()
    found = tau_norm_sweep(features, labels, classifier, [0, 0.7, 1], train_counts=COUNTS)
    for i, tau in enumerate([0, 0.7, 1]):
        scores = np.stack(
            [features.astype(np.float64) @ row / np.sqrt(row @ row) ** tau for row in weight], 1
        )
        expected = accuracies(scores, labels, train_counts=COUNTS)
        assert {name: x[i] for name, x in found.items()} == pytest.approx(expected)


@pytest.fixture
def clouds():
    generator = np.random.default_rng(2)
    train_labels = np.repeat([0, 1, 2], [20, 10, 5])
    test_labels = np.repeat([0, 1, 2], 10)
    centers = generator.normal(size=(3, 6))
    return (
        centers[train_labels] + 0.5 * generator.normal(size=(35, 6)) + 1,
        train_labels,
        centers[test_labels] + 0.5 * generator.normal(size=(30, 6)) + 1,
        test_labels,
    )


def test_the_nearest_mean_by_cosine_is_that_of_a_loop(clouds):
    train, train_labels, test, test_labels = clouds
    scores = nearest_mean_scores(train, train_labels, test, classes=3)
    for i, row in enumerate(test):
        for c in range(3):
            own = [x / np.sqrt(x @ x) for x in train[train_labels == c]]
            mean = sum(own) / len(own)
            cosine = row @ mean / np.sqrt(row @ row) / np.sqrt(mean @ mean)
            assert scores[i, c] == pytest.approx(cosine)
    assert (scores.argmax(1) == test_labels).mean() > 0.6  # twice chance


def test_what_cannot_be_is_refused(clouds):
    train, train_labels, test, _ = clouds
    with pytest.raises(ValueError, match="class 3 has no training images"):
        nearest_mean_scores(train, train_labels, test, classes=4)
