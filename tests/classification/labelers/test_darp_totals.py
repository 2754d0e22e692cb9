import numpy as np
import pytest

from ssod_imwa.classification.labelers.darp_totals import soft_confusion, solve_totals


def test_a_column_is_the_mean_prediction_of_a_class():
    generator = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 2, 1, 0, 2])
    probabilities = generator.dirichlet([1, 1, 1], size=7)
    confusion = soft_confusion(probabilities, labels, classes=3)
    for k in range(3):
        column = [0.0, 0.0, 0.0]
        for row, label in zip(probabilities, labels, strict=True):
            if label == k:
                column = [x + y / list(labels).count(k) for x, y in zip(column, row, strict=True)]
        np.testing.assert_allclose(confusion[:, k], column, atol=1e-12)
    with pytest.raises(ValueError, match="class 1 has no image"):
        soft_confusion(probabilities, np.zeros(7, int), classes=2)


@pytest.mark.parametrize("totals", [[500, 50, 5], [5, 50, 500], [185, 185, 185]])
def test_totals_of_predictions_with_known_confusion_are_found(totals):
    """What is predicted is made of the totals and the confusion; the shares alone are not."""
    confusion = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.3], [0.1, 0.2, 0.6]])
    predicted = sum(total * column for total, column in zip(totals, confusion.T, strict=True))
    np.testing.assert_allclose(solve_totals(confusion, predicted), totals, rtol=1e-9)
    assert not np.allclose(predicted, totals, rtol=0.1) or len(set(totals)) == 1


def test_what_says_nothing_is_refused():
    alike = np.full((3, 3), 1 / 3) + 1e-4 * np.eye(3)  # all classes are predicted alike
    assert np.linalg.cond(alike) > 1000
    assert solve_totals(alike, np.ones(3)) is None
    assert solve_totals(np.full((3, 3), 1 / 3), np.ones(3)) is None  # of condition infinity
    # More is predicted as class 0 than 100 images of it explain: class 1 would be negative.
    confusion = np.array([[0.6, 0.3], [0.4, 0.7]])
    assert solve_totals(confusion, np.array([70.0, 30.0])) is None
