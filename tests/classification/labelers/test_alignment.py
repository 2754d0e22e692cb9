import pytest
import torch

from ssod_imwa.classification.labelers.alignment import (
    Alignment,
    AlignmentOptions,
    alignment_exponent,
)


def reference(counts, exponent, history, probabilities):
    """Labels of one batch with lists; `history` holds the mean predictions that are compared."""
    target = [(n / sum(counts)) ** exponent for n in counts]
    target = [p / sum(target) for p in target]
    mean = [sum(column) / len(history) for column in zip(*history, strict=True)]
    rows = []
    for row in probabilities:
        aligned = [q * (p + 1e-6) / (m + 1e-6) for q, p, m in zip(row, target, mean, strict=True)]
        rows.append([x / sum(aligned) for x in aligned])
    return rows


@pytest.mark.parametrize("start", ["none", "uniform"])
def test_labels_are_those_of_a_plain_loop(small, start):
    options = AlignmentOptions(0.6, batches=3, batches_at_start=start)
    labeler = Alignment(small.COUNTS, options, generation=2, generations=3)
    history = [[1 / 3] * 3] * 3 if start == "uniform" else []
    for t in range(7):
        if t == 5:  # as late in training, at the same place of the ring
            labeler.written += 3_000_000
        probabilities = small.weak(t).logits.double().softmax(1).tolist()
        mean = [sum(column) / len(probabilities) for column in zip(*probabilities, strict=True)]
        before, history = history, [*history, mean][-3:]
        seen = history if start == "none" else before
        expected = reference(small.COUNTS, 0.75, seen, probabilities)
        labels = small.advance(labeler, t)
        for found, row, target, sure in zip(
            labels.probabilities.tolist(), expected, labels.targets, labels.mask, strict=True
        ):
            assert found == pytest.approx(row, abs=1e-5)
            assert int(target) == row.index(max(row))
            assert bool(sure) == (max(row) >= 0.6)


def test_exponents_are_those_of_five_generations():
    found = [alignment_exponent(g, 5, minimum=0.5) for g in range(1, 6)]
    assert found == [1, 0.875, 0.75, 0.625, 0.5]
    assert alignment_exponent(1, 1, minimum=0.5) == 1
    with pytest.raises(ValueError, match=r"generation = 6 is not allowed \(must be 1..5\)"):
        alignment_exponent(6, 5, minimum=0.5)


def test_a_prediction_equal_to_the_prior_is_left_as_it_is(small):
    labeler = Alignment(small.COUNTS, AlignmentOptions())
    weak = small.weak(0)
    prior = torch.tensor(small.COUNTS) / sum(small.COUNTS)
    weak.logits.copy_(prior.log().expand_as(weak.logits))
    torch.testing.assert_close(labeler.label(weak, 0).probabilities[0], prior)
