import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ssod_imwa.classification.labelers.darp import DARP, DARPOptions, class_totals
from ssod_imwa.classification.labelers.darp_solver import (
    Accuracy,
    nearest_labels,
    row_weights,
    without_noise,
)

EXACT = Accuracy(rounds=500, newton_steps=100, tolerance=1e-10)


def random_rows(images, classes, seed):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.dirichlet([0.6] * classes, size=images)) * 0.998 + (
        0.002 / classes
    )


def objective(x, rows, weights):
    x = x.reshape(rows.shape)
    return float((weights[:, None] * x * np.log(x / rows)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_solution_is_a_general_convex_solvers(seed):
    images, classes = 5, 3
    rows = random_rows(images, classes, seed)
    weights = row_weights(rows)
    totals = torch.tensor([2.5, 1.5, 1.0], dtype=torch.float64)
    found = nearest_labels(rows, weights, totals, EXACT)
    p, w = rows.numpy(), weights.numpy()
    constraints = [
        {"type": "eq", "fun": lambda x: x.reshape(images, classes).sum(1) - 1},
        # One column follows from the others.
        {"type": "eq", "fun": lambda x: (x.reshape(images, classes).sum(0) - totals.numpy())[:-1]},
    ]
    best = minimize(
        objective,
        np.full(images * classes, 1 / classes),
        args=(p, w),
        method="SLSQP",
        bounds=[(1e-9, 1)] * (images * classes),
        constraints=constraints,
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert best.success
    np.testing.assert_allclose(found.numpy(), best.x.reshape(images, classes), atol=2e-5)
    assert objective(found.numpy(), p, w) <= best.fun + 1e-8


@pytest.mark.parametrize(("images", "classes"), [(40, 3), (300, 10)])
def test_the_solution_meets_both_constraints(images, classes):
    rows = random_rows(images, classes, 7)
    totals = torch.linspace(3, 1, classes, dtype=torch.float64)
    totals *= images / totals.sum()
    found = nearest_labels(rows, row_weights(rows), totals, EXACT)
    torch.testing.assert_close(found.sum(1), torch.ones(images, dtype=torch.float64))
    torch.testing.assert_close(found.sum(0), totals, atol=1e-6, rtol=0)
    assert (found > 0).all()


def test_the_usual_accuracy_is_within_an_image_of_the_totals():
    rows = without_noise(random_rows(400, 10, 3), torch.full((10,), 40.0), alpha=2.0)
    totals = torch.full((10,), 40.0, dtype=torch.float64)
    found = nearest_labels(rows, row_weights(rows), totals)
    assert (found.sum(0) - totals).abs().max() < 1


def test_one_hot_rows_are_solved_too():
    rows = without_noise(torch.eye(3).repeat(4, 1), torch.full((3,), 4.0), alpha=2.0)
    found = nearest_labels(rows, row_weights(rows), torch.full((3,), 4.0))
    torch.testing.assert_close(found, torch.eye(3).repeat(4, 1).double(), atol=1e-4, rtol=0)


def test_labels_that_meet_the_totals_are_left_as_they_are():
    rows = random_rows(30, 3, 1)
    found = nearest_labels(rows, row_weights(rows), rows.sum(0), EXACT)
    torch.testing.assert_close(found, rows, atol=1e-8, rtol=0)


def test_totals_that_are_not_the_number_of_images_are_refused():
    rows = random_rows(10, 2, 1)
    with pytest.raises(ValueError, match=r"totals of the sum 8 are not allowed \(must be the 10"):
        nearest_labels(rows, row_weights(rows), torch.tensor([4.0, 4.0]))


def test_noise_is_removed_as_a_plain_loop_does():
    rows, totals = random_rows(12, 3, 5), [6.0, 4.0, 2.0]
    found = without_noise(rows, torch.tensor(totals), alpha=0.75)
    kept = [[0.0] * 3 for _ in range(12)]
    for k, total in enumerate(totals):
        count = math.floor(0.75 * total)
        best = sorted(range(12), key=lambda n: -float(rows[n, k]))[:count]
        factor = (total + 1e-6) / (sum(float(rows[n, k]) for n in best) + 1e-6)
        for n in best:
            kept[n][k] = float(rows[n, k]) * factor
    for row, expected in zip(found.tolist(), kept, strict=True):
        expected = [x + 1e-6 for x in expected]
        assert row == pytest.approx([x / sum(expected) for x in expected], rel=1e-9)


def test_weights_are_inverse_entropies():
    rows = random_rows(6, 4, 2)
    for row, weight in zip(rows.tolist(), row_weights(rows).tolist(), strict=True):
        assert weight == pytest.approx(-1 / sum(p * math.log(p) for p in row))
    assert row_weights(torch.eye(2)).tolist() == pytest.approx([1000, 1000])


def test_rows_of_the_last_solution_are_the_labels(small):
    options = DARPOptions(0.6, warmup_part=0.5, refine_period=3, totals=[6, 4, 2])
    labeler = DARP(small.COUNTS, small.UNLABELED, options, iterations=8)
    table = torch.full((small.UNLABELED, 3), 1 / 3)
    solved = None
    for t in range(8):
        weak, labels = small.weak(t), small.advance(labeler, t)
        q = weak.logits.softmax(1)
        table[weak.indices] = q
        if t in (4, 7):
            cleaned = without_noise(table, labeler.totals, alpha=2.0)
            solved = nearest_labels(cleaned, row_weights(cleaned), labeler.totals).float()
        expected = q if t < 4 else solved[weak.indices]
        torch.testing.assert_close(labels.probabilities, expected)
        assert torch.equal(labels.targets, expected.argmax(1))
        assert torch.equal(labels.mask, expected.amax(1) >= 0.6)
    assert torch.equal(labeler.predicted, table)


def test_totals_are_the_labeled_shares_or_an_estimate():
    torch.testing.assert_close(class_totals([30, 10, 4], 22, []), torch.tensor([15.0, 5.0, 2.0]))
    torch.testing.assert_close(class_totals([3, 1], 10, [1.0, 4.0]), torch.tensor([2.0, 8.0]))
    for estimate in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"totals = .* \(must be above 0, one for each of"):
            class_totals([3, 1], 10, estimate)
