import math
import statistics

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from ssod_imwa.classification.evaluation import (
    class_recalls,
    classification_metrics,
    expected_calibration_error,
    generalized_mean,
    group_accuracies,
    maximum_calibration_error,
    reliability_bins,
    top_k_accuracy,
)


@pytest.fixture
def predicted():
    """Probabilities and labels of 400 images and 8 classes, better than chance."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 50)
    logits = generator.normal(size=(400, 8))
    logits[np.arange(400), labels] += generator.uniform(0, 3, size=400)
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(1, keepdims=True), labels


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_accuracy_is_scikit_learns(predicted, k):
    expected = top_k_accuracy_score(predicted[1], predicted[0], k=k, labels=np.arange(8))
    assert top_k_accuracy(*predicted, k=k) == expected


def test_top_k_accuracy_of_all_classes_is_1(predicted):
    assert top_k_accuracy(*predicted, k=8) == 1.0
    assert top_k_accuracy(np.zeros((3, 1)), np.zeros(3, dtype=int), k=1) == 1.0


def test_equal_scores_rank_by_class_as_argmax_does():
    scores = np.zeros((3, 3))
    labels = np.arange(3)
    assert [top_k_accuracy(scores, labels, k=k) for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
    assert top_k_accuracy(scores, labels, k=1) == (scores.argmax(1) == labels).mean()


@pytest.mark.parametrize("k", [0, 9])
def test_top_k_accuracy_refuses_k(predicted, k):
    with pytest.raises(ValueError, match=rf"k = {k} is not allowed \(must be 1..C = 8\)"):
        top_k_accuracy(*predicted, k=k)


def test_recalls_equal_a_count_class_by_class(predicted):
    predictions, labels = predicted[0].argmax(1), predicted[1]
    recalls = class_recalls(predictions, labels, classes=8)
    for label in range(8):
        right = sum(p == label for p, y in zip(predictions, labels, strict=True) if y == label)
        assert recalls[label] == right / 50
    assert recalls.mean() == pytest.approx(balanced_accuracy_score(labels, predictions))


def test_recall_of_a_class_without_images_is_nan_and_of_a_missed_class_0():
    recalls = class_recalls(np.array([2, 0, 2]), np.array([0, 0, 1]), classes=4)
    np.testing.assert_array_equal(recalls, [0.5, 0.0, np.nan, np.nan])


def test_recall_of_one_class_alone_is_1():
    np.testing.assert_array_equal(class_recalls(np.zeros(2, int), np.zeros(2, int), classes=1), [1])


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 4], [0, 1], r"predictions with 4 are not allowed \(must be 0..3\)"),
        ([0, 1], [0, -1], r"labels with -1 are not allowed \(must be 0..3\)"),
        ([0], [0, 1], "1 predictions do not fit 2 labels"),
        ([], [], "at least one"),
        ([0.0], [0], "row of integers"),
    ],
)
def test_recalls_refuse_arrays_that_do_not_fit(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        class_recalls(np.array(predictions), np.array(labels), classes=4)


def test_groups_change_at_20_and_at_100_images():
    counts = [101, 100, 21, 20, 19, 1]
    recalls = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    standard = group_accuracies(recalls, counts)
    assert standard == pytest.approx({"many": 1.0, "medium": (0.8 + 0.6 + 0.4) / 3, "few": 0.1})
    mislas = group_accuracies(recalls, counts, rule="mislas")
    assert mislas == pytest.approx({"many": 1.0, "medium": 0.7, "few": 0.2})


@pytest.mark.parametrize(
    ("largest", "classes", "imbalance", "sizes"),
    [
        (5000, 10, 10, (10, 0, 0)),
        (5000, 10, 100, (8, 2, 0)),
        (500, 100, 10, (69, 31, 0)),
        (500, 100, 50, (41, 41, 18)),
        (500, 100, 100, (35, 35, 30)),
        (500, 100, 200, (30, 31, 39)),
        (500, 200, 100, (70, 70, 60)),
    ],
)
def test_groups_of_long_tailed_sets_have_the_published_sizes(largest, classes, imbalance, sizes):
    counts = [int(largest * imbalance ** (-c / (classes - 1))) for c in range(classes)]
    found = []
    for name in ("many", "medium", "few"):
        # With a recall of 1 for the first n classes the group's accuracy tells where it ends.
        shares = [
            group_accuracies(np.arange(classes) < n, counts).get(name, 0.0)
            for n in range(classes + 1)
        ]
        found.append(int((np.diff(shares) > 0).sum()))
    assert tuple(found) == sizes


def test_a_group_without_tested_classes_is_nan_not_0_and_one_without_classes_is_missing():
    recalls = np.array([0.9, np.nan, 0.3])
    groups = group_accuracies(recalls, [500, 50, 500])
    assert groups == {"many": pytest.approx(0.6), "medium": pytest.approx(np.nan, nan_ok=True)}


def test_groups_refuse_an_unknown_rule_and_missing_counts():
    with pytest.raises(ValueError, match=r"'oltr' is not allowed .*standard"):
        group_accuracies(np.ones(2), [1, 2], rule="oltr")
    with pytest.raises(ValueError, match="one a class"):
        group_accuracies(np.ones(2), [1, 2, 3])


def test_means_equal_those_of_the_standard_library():
    recalls = np.random.default_rng(1).uniform(0.01, 1, size=50)
    values = recalls.tolist()
    for power, reference in [
        (-1, statistics.harmonic_mean),
        (0, statistics.geometric_mean),
        (1, statistics.fmean),
    ]:
        assert generalized_mean(recalls, power=power) == pytest.approx(reference(values))


@pytest.mark.parametrize("power", [-3.0, -0.5, 0.01, 2.0, 7.5])
def test_power_means_equal_the_formula(power):
    recalls = np.random.default_rng(2).uniform(0.01, 1, size=50)
    expected = (sum(r**power for r in recalls.tolist()) / 50) ** (1 / power)
    assert generalized_mean(recalls, power=power) == pytest.approx(expected)


def test_power_means_tend_to_the_extremes():
    recalls = np.array([0.0, 0.2, 0.9])
    assert generalized_mean(recalls, power=-math.inf) == 1e-3
    assert generalized_mean(recalls, power=math.inf) == 0.9
    assert generalized_mean(recalls, power=-1e4) == pytest.approx(1e-3, rel=1e-3)
    assert generalized_mean(recalls, power=1e4) == pytest.approx(0.9, rel=1e-3)
    powers = [-math.inf, -50, -1, -1e-6, 0, 1e-6, 1, 50, math.inf]
    means = [generalized_mean(recalls, power=power) for power in powers]
    assert means == sorted(means)


def test_a_recall_of_0_counts_as_a_thousandth_and_a_smaller_one_as_itself():
    assert generalized_mean(np.array([0.0, 1.0]), power=-1) == pytest.approx(2 / 1001)
    assert generalized_mean(np.array([1e-4, 1.0]), power=-1) == pytest.approx(2 / 10001)
    assert generalized_mean(np.array([0.0, np.nan]), power=0) == pytest.approx(1e-3)


def test_a_dead_class_of_places_adds_2_74_to_the_inverse_of_the_harmonic_mean():
    recalls = np.full(365, 0.4)
    alive = 1 / generalized_mean(recalls, power=-1)
    recalls[7] = 0.0
    assert 1 / generalized_mean(recalls, power=-1) - alive == pytest.approx(2.74, abs=0.01)


@pytest.mark.parametrize(
    ("recalls", "power", "message"),
    [
        ([40.0], 1, "fractions"),
        ([-0.1], 1, "fractions"),
        ([np.nan], 1, "at least one"),
        ([0.5], math.nan, "power"),
    ],
)
def test_means_refuse_numbers_out_of_range(recalls, power, message):
    with pytest.raises(ValueError, match=message):
        generalized_mean(np.array(recalls), power=power)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_errors_equal_a_loop_over_bins(predicted, bins):
    probabilities, labels = predicted
    errors, total = [], 0.0
    for b in range(bins):
        members = [n for n in range(400) if b / bins < probabilities[n].max() <= (b + 1) / bins]
        if members:
            right = sum(probabilities[n].argmax() == labels[n] for n in members) / len(members)
            sure = sum(probabilities[n].max() for n in members) / len(members)
            errors.append(abs(right - sure))
            total += len(members) / 400 * errors[-1]
    found = reliability_bins(probabilities, labels, bins=bins)
    assert found.images.sum() == 400
    assert expected_calibration_error(found) == pytest.approx(total)
    assert maximum_calibration_error(found) == pytest.approx(max(errors))


def test_bins_are_closed_on_the_right_and_hold_0():
    confidences = np.array([0.0, 0.25, 0.2500001, 0.5, 1.0, 1.0005])
    probabilities = np.stack([confidences, np.zeros(6)], axis=1)
    found = reliability_bins(probabilities, np.zeros(6, dtype=int), bins=4)
    assert found.images.tolist() == [2, 2, 0, 2]
    assert np.isnan(found.confidence[2])
    assert np.isnan(found.accuracy[2])


def test_half_precision_probabilities_are_summed_in_double(predicted):
    probabilities = predicted[0].astype(np.float16)
    found = reliability_bins(probabilities, predicted[1])
    reference = reliability_bins(probabilities.astype(np.float64), predicted[1])
    np.testing.assert_array_equal(found.confidence, reference.confidence)
    assert found.confidence.dtype == np.float64


def test_bins_refuse_logits_and_no_bins(predicted):
    with pytest.raises(ValueError, match="softmax of logits"):
        reliability_bins(np.log(predicted[0]), predicted[1])
    with pytest.raises(ValueError, match="bins = 0"):
        reliability_bins(*predicted, bins=0)


def test_scores_that_do_not_fit_are_refused(predicted):
    with pytest.raises(ValueError, match=r"\(400, 8\) do not fit 3 labels"):
        top_k_accuracy(predicted[0], predicted[1][:3], k=1)
    with pytest.raises(ValueError, match=r"must be \(N, C\)"):
        top_k_accuracy(predicted[0][0], predicted[1], k=1)
    with pytest.raises(ValueError, match="nan"):
        top_k_accuracy(np.array([[np.nan, 0.0]]), np.array([0]), k=1)


def test_all_metrics_are_those_of_the_single_functions(predicted):
    probabilities, labels = predicted
    counts = [900, 400, 150, 80, 40, 20, 10, 5]
    metrics = classification_metrics(probabilities, labels, train_counts=counts)
    recalls = class_recalls(probabilities.argmax(1), labels, classes=8)
    assert metrics == {
        "top1": pytest.approx(recalls.mean()),
        "top5": top_k_accuracy(probabilities, labels, k=5),
        **group_accuracies(recalls, counts),
        "mean_recall": pytest.approx(recalls.mean()),
        "h_mean": generalized_mean(recalls, power=-1),
        "g_mean": generalized_mean(recalls, power=0),
        "lowest_recall": recalls.min(),
        "zero_recall_classes": 0.0,
        "ece": expected_calibration_error(reliability_bins(probabilities, labels)),
    }
    assert {type(value) for value in metrics.values()} == {float}


def test_metrics_of_few_classes_have_no_top5():
    probabilities, labels = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])
    metrics = classification_metrics(probabilities, labels, train_counts=[50, 50])
    assert metrics == {
        "top1": 0.5,
        "medium": 0.5,
        "mean_recall": 0.5,
        "h_mean": pytest.approx(2 / 1001),
        "g_mean": pytest.approx(math.sqrt(1e-3)),
        "lowest_recall": 0.0,
        "zero_recall_classes": 1.0,
        "ece": 0.5,
    }


def test_mean_recall_counts_classes_alike_where_top1_counts_images():
    """Small-ImageNet-127's test set is imbalanced: the two differ."""
    predictions, labels = np.array([0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 1])
    metrics = classification_metrics(np.eye(2)[predictions], labels, train_counts=[9, 1])
    assert metrics["top1"] == 0.8
    assert metrics["mean_recall"] == 0.5
