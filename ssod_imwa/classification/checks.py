"""Checks of arguments that many functions share; each raises ValueError with the value and rule."""

from __future__ import annotations

import math
from collections.abc import Collection


def check_above_0(**values: float) -> None:
    """Refuse values that are not finite and above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value} is not allowed (must be above 0)")


def check_at_least_0(**values: float) -> None:
    """Refuse values that are not finite and 0 or more."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value} is not allowed (must be 0 or more)")


def check_at_least_1(**values: int) -> None:
    """Refuse values below 1."""
    for name, value in values.items():
        if not value >= 1:
            raise ValueError(f"{name} = {value} is not allowed (must be at least 1)")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Refuse a value that is not one of the allowed."""
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not allowed (must be one of {list(allowed)})")
