import math
from dataclasses import dataclass
from typing import Literal

import pytest

from ssod_imwa.config.options import ABOVE_0, Options, Switch, option, options_of, read_options
from ssod_imwa.config.sections import Section, active_sections, build_tree, why_inactive


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
        ({"free": math.nan}, r"free = nan is not allowed \(must be a finite number\)"),
        ({"kind": "both"}, r"kind = 'both' is not allowed \(must be one of 'one', 'other'\)"),
        ({"sizes": [3, 0]}, r"sizes = \[3, 0\] is not allowed \(must be above 0\)"),
    ],
)
def test_options_made_in_python_refuse_what_the_reader_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Sample(**settings)


def test_values_at_closed_bounds_are_allowed():
    Sample(count=1, share=1.0, momentum=0, sizes=[])


@dataclass(frozen=True)
class TaskOptions(Options):
    task: str = option("boxes", "what is trained", choices=("boxes", "classes"))


@dataclass(frozen=True)
class InnerOptions(Options):
    thresholds: list[float] = option([0.3, 0.7], "of IoU", low=0, high=1)
    sizes: list[list[int]] = option([[1], [2]], "in pixels")


@dataclass(frozen=True)
class BoxOptions(Options):
    kind: Literal["plain", "fast"] = option("plain", "of the detector")
    inner: InnerOptions = InnerOptions()


@dataclass(frozen=True)
class LossOptions(Options):
    name: str = option("ce", "of the loss", choices=("ce", "focal"))


@dataclass(frozen=True)
class FocalOptions(Options):
    gamma: float = option(1.0, "exponent", low=0)


CLASSES = {"TASK": ("classes",)}
SECTIONS = (
    Section("", TaskOptions),
    Section("BOX", BoxOptions, {"TASK": ("boxes",)}),
    Section("LOSS", LossOptions, CLASSES),
    Section("LOSS", FocalOptions, {**CLASSES, "LOSS.NAME": ("focal",)}),
)


def test_the_tree_has_the_keys_of_active_sections_alone():
    assert build_tree(active_sections(SECTIONS, {})) == {
        "TASK": "boxes",
        "BOX": {"KIND": "plain", "INNER": {"THRESHOLDS": [0.3, 0.7], "SIZES": [[1], [2]]}},
    }
    chosen = active_sections(SECTIONS, {"TASK": "classes", "LOSS.NAME": "focal"})
    assert build_tree(chosen).LOSS == {"NAME": "ce", "GAMMA": 1.0}


def test_a_condition_on_a_key_that_is_not_in_the_tree_does_not_hold():
    assert len(active_sections(SECTIONS, {"LOSS.NAME": "focal"})) == 2


def test_trees_share_no_lists():
    first, second = build_tree(SECTIONS[1:2]), build_tree(SECTIONS[1:2])
    first.BOX.INNER.SIZES[0][0] = 9
    first.BOX.INNER.THRESHOLDS[0] = 0.9
    assert second.BOX.INNER == {"THRESHOLDS": [0.3, 0.7], "SIZES": [[1], [2]]}


def test_options_are_read_with_their_groups():
    tree = build_tree(SECTIONS[1:2])
    tree.BOX.KIND = "fast"
    tree.BOX.INNER.THRESHOLDS = [0.5]
    inner = InnerOptions(thresholds=[0.5], sizes=[[1], [2]])
    assert read_options(BoxOptions, tree.BOX) == BoxOptions("fast", inner)


def test_two_sections_with_one_key_cannot_be_active_at_once():
    with pytest.raises(ValueError, match=r"LOSS.GAMMA is declared twice"):
        build_tree([SECTIONS[3], SECTIONS[3]])


def test_a_field_that_is_no_option_is_refused():
    @dataclass(frozen=True)
    class Wrong:
        gamma: float = 1.0

    with pytest.raises(TypeError, match=r"Wrong.gamma is not an option"):
        options_of(Wrong)


def test_the_reason_names_the_condition_that_fails_first():
    boxes, plain = {"TASK": "boxes"}, {"TASK": "classes", "LOSS.NAME": "ce"}
    assert why_inactive(SECTIONS, "LOSS.GAMMA", boxes) == (
        "has no meaning with TASK = 'boxes' (it belongs to TASK = 'classes')"
    )
    assert why_inactive(SECTIONS, "LOSS.GAMMA", plain) == (
        "has no meaning with LOSS.NAME = 'ce' (it belongs to LOSS.NAME = 'focal')"
    )


def test_the_reason_follows_a_condition_on_a_missing_key_to_its_own():
    sections = [*SECTIONS[:3], Section("LOSS", FocalOptions, {"LOSS.NAME": ("focal",)})]
    assert why_inactive(sections, "LOSS.GAMMA", {"TASK": "boxes"}) == (
        "has no meaning with TASK = 'boxes' (it belongs to TASK = 'classes')"
    )


def test_the_reason_lists_everything_that_a_key_belongs_to():
    again = Section("LOSS", FocalOptions, {**CLASSES, "LOSS.NAME": ("ldam",)})
    reason = why_inactive([*SECTIONS, again], "LOSS.GAMMA", {"TASK": "classes", "LOSS.NAME": "ce"})
    assert reason.endswith("(it belongs to LOSS.NAME = 'focal' or 'ldam')")


@dataclass(frozen=True)
class ThinOptions(Options):
    ratio: float = option(0.0, "of first to last", low=0)
    split: Literal["drawn", "first"] = option("drawn", "what is kept", when={"ratio": ABOVE_0})
    seed: int = option(0, "of the draw", when={"ratio": ABOVE_0, "split": ("drawn",)})


THIN = Section("THIN", ThinOptions)


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({}, ["RATIO"]),
        ({"THIN.RATIO": 0.5}, ["RATIO", "SPLIT", "SEED"]),
        ({"THIN.RATIO": 0.5, "THIN.SPLIT": "first"}, ["RATIO", "SPLIT"]),
        ({"THIN.RATIO": "many"}, ["RATIO"]),  # refused where values are checked
    ],
)
def test_an_option_may_depend_on_those_beside_it(values, keys):
    assert list(build_tree(active_sections([THIN], values)).THIN) == keys


def test_options_of_a_group_depend_on_those_of_the_group():
    @dataclass(frozen=True)
    class Outer(Options):
        thin: ThinOptions = ThinOptions()

    tree = build_tree(active_sections([Section("DATA", Outer)], {"DATA.THIN.RATIO": 1.0}))
    assert tree == {"DATA": {"THIN": {"RATIO": 0.0, "SPLIT": "drawn", "SEED": 0}}}


def test_the_reason_has_the_words_of_a_switch():
    assert why_inactive([THIN], "THIN.SPLIT", {"THIN.RATIO": 0.0}) == (
        "has no meaning with THIN.RATIO = 0.0 (it belongs to THIN.RATIO above 0)"
    )
    assert why_inactive([THIN], "THIN.SEED", {"THIN.RATIO": 1.0, "THIN.SPLIT": "first"}) == (
        "has no meaning with THIN.SPLIT = 'first' (it belongs to THIN.SPLIT = 'drawn')"
    )


def test_the_reason_is_of_the_section_that_comes_nearest():
    """A key of two methods: the other method is no way to have it."""
    on = Switch("on", lambda value: value is True)
    sections = [
        Section("LOSS", FocalOptions, {"TASK": ("boxes",), "BOX.ON": on}),
        Section("LOSS", FocalOptions, {"TASK": ("classes",), "LOSS.ON": on}),
    ]
    reason = why_inactive(sections, "LOSS.GAMMA", {"TASK": "classes", "LOSS.ON": False})
    assert reason == "has no meaning with LOSS.ON = False (it belongs to LOSS.ON on)"
