"""How the number of images or boxes falls from the most frequent class to the rarest."""

from ssod_imwa.errors import DataError


def exponential_profile(classes: int, ratio: float) -> list[float]:
    """ratio^(-c / (classes - 1)) for each class c: 1 at the head, 1 / ratio at the tail.

    Args:
        classes: C, at least 1.
        ratio: images of the head class over those of the tail class (γ), at least 1.

    Raises:
        DataError: a number is out of range.

    Example:
        >>> exponential_profile(3, 4)
        [1.0, 0.5, 0.25]
    """
    _check(classes, ratio)
    return [float(ratio ** (-c / max(1, classes - 1))) for c in range(classes)]


def step_profile(classes: int, ratio: float) -> list[float]:
    """1 for the first half of the classes (rounded down), 1 / ratio for the others.

    Args:
        classes: C, at least 1.
        ratio: images of a head class over those of a tail class, at least 1.

    Raises:
        DataError: a number is out of range.

    Example:
        >>> step_profile(5, 4)
        [1.0, 1.0, 0.25, 0.25, 0.25]
    """
    _check(classes, ratio)
    return [1.0 if c < classes // 2 else 1 / ratio for c in range(classes)]


def _check(classes: int, ratio: float) -> None:
    if classes < 1:
        raise DataError(f"classes = {classes} is not allowed (must be at least 1)")
    if not 1 <= ratio < float("inf"):
        raise DataError(f"ratio = {ratio} is not allowed (must be at least 1: head over tail)")
