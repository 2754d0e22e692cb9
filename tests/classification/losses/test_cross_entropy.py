import pytest

from ssod_imwa.classification.losses.cross_entropy import CrossEntropy, CrossEntropyOptions


def test_cross_entropy_takes_labels_and_shares(by_hand, logits, labels, shares):
    criterion = CrossEntropy(by_hand.COUNTS, CrossEntropyOptions())
    loss = criterion(logits, labels, progress=0.0).item()
    assert loss == pytest.approx(by_hand.cross_entropy(logits, by_hand.TARGETS))
    mixed = criterion(logits, shares, progress=0.0).item()
    assert mixed == pytest.approx(by_hand.cross_entropy(logits, shares.tolist()))


# Epoch 160 of 200 of the public code; 3 of 4 epochs done is before 0.8, 4 of 5 is not.
@pytest.mark.parametrize(
    ("done", "of", "weighted"),
    [
        (0, 200, False),
        (159, 200, False),
        (160, 200, True),
        (199, 200, True),
        (3, 4, False),
        (4, 5, True),
        (8, 10, True),
        (24, 30, True),
        (23, 30, False),
    ],
)
def test_drw_weights_classes_from_0_8_of_training_on(by_hand, logits, labels, done, of, weighted):
    criterion = CrossEntropy(
        by_hand.COUNTS, CrossEntropyOptions(weights="effective_number", weights_from=0.8)
    )
    loss = criterion(logits, labels, progress=done / of).item()
    by_class = by_hand.effective_weights(0.9999) if weighted else (1.0, 1.0, 1.0)
    expected = by_hand.cross_entropy(logits, by_hand.TARGETS, weights=by_class)
    assert loss == pytest.approx(expected, rel=1e-6)
