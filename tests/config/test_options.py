import math
from dataclasses import dataclass
from typing import Literal

import pytest

from ssod_imwa.config.options import Options, option, options_of


@dataclass(frozen=True)
class Sample(Options):
    count: int = option(1, "at least one", low=1)
    share: float = option(0.5, "of a whole", low=0, high=1)
    momentum: float = option(0.9, "of a whole, not all", low=0, below=1)
    rate: float = option(0.1, "positive", above=0)
    free: float = option(0.0, "anything")
    kind: Literal["one", "other"] = option("one", "one of two")
    sizes: list[int] = option([1, 2], "positive sizes", above=0)


def test_a_literal_has_its_choices():
    assert options_of(Sample)["KIND"].choices == ("one", "other")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("COUNT", "at least 1"),
        ("SHARE", "0..1"),
        ("MOMENTUM", "at least 0, below 1"),
        ("RATE", "above 0"),
        ("FREE", ""),
    ],
)
def test_ranges_are_said_in_words(name, words):
    assert options_of(Sample)[name].range == words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, r"count = 0 is not allowed \(must be at least 1\)"),
        ({"share": 1.5}, r"share = 1.5 is not allowed \(must be 0..1\)"),
        ({"momentum": 1.0}, r"momentum = 1.0 is not allowed \(must be at least 0, below 1\)"),
        ({"rate": 0}, r"rate = 0 is not allowed \(must be above 0\)"),
        ({"rate": math.nan}, "rate = nan is not allowed"),
        ({"free": math.nan}, r"free = nan is not allowed \(must be a number\)"),
        ({"kind": "both"}, r"kind = 'both' is not allowed \(must be one of 'one', 'other'\)"),
        ({"sizes": [3, 0]}, r"sizes = \[3, 0\] is not allowed \(must be above 0\)"),
    ],
)
def test_options_made_in_python_refuse_what_the_reader_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Sample(**settings)


def test_values_at_closed_bounds_are_allowed():
    Sample(count=1, share=1.0, momentum=0, sizes=[])
