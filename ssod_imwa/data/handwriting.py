"""How scikit-learn's handwritten digits are divided, for digit scenes and for digit images."""

import numpy as np

CLASSES = tuple("0123456789")

_TEST_SHARE = 5  # every fifth image of a class is for testing


def is_for_testing(labels: np.ndarray) -> np.ndarray:
    """Which images are for testing, bool (n,): every fifth of a class, beginning with its first.

    Args:
        labels: int (n,), in the order of scikit-learn's data set.

    Example:
        >>> is_for_testing(np.array([7, 7, 3, 7, 7, 7, 7])).nonzero()[0].tolist()
        [0, 2, 6]
    """
    number = np.zeros(len(labels), dtype=np.int64)  # of the image within its class
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        number[positions] = np.arange(len(positions))
    return number % _TEST_SHARE == 0
