from dataclasses import dataclass, replace

import pytest
from fvcore.common.config import CfgNode

from ssod_imwa.config.options import Options, option
from ssod_imwa.config.reader import (
    Setting,
    build_config,
    changed_config,
    override_settings,
    value_of,
)
from ssod_imwa.config.sections import Section
from ssod_imwa.errors import ConfigError


@dataclass(frozen=True)
class LossOptions(Options):
    name: str = option("ce", "of the loss", choices=("ce", "focal"))


@dataclass(frozen=True)
class FocalOptions(Options):
    gamma: float = option(1.0, "exponent", low=0)


@dataclass(frozen=True)
class SolverOptions(Options):
    max_iter: int = option(10, "iterations", low=1)


SECTIONS = (
    Section("LOSS", LossOptions),
    Section("LOSS", FocalOptions, {"LOSS.NAME": ("focal",)}),
    Section("SOLVER", SolverOptions),
)


def build(*overrides, toolkit=None):
    return build_config(SECTIONS, override_settings(overrides), toolkit=toolkit)


def test_the_last_setting_wins_and_chooses_the_keys():
    assert build("LOSS.NAME", "focal", "LOSS.GAMMA", "1", "LOSS.GAMMA", "2").LOSS.GAMMA == 2.0
    assert build("LOSS.NAME", "focal", "LOSS.NAME", "ce").LOSS == {"NAME": "ce"}


FOCAL = Setting("LOSS.NAME", "focal", "base.yaml")
GAMMA = Setting("LOSS.GAMMA", 2.0, "base.yaml")
CE = Setting("LOSS.NAME", "ce", "leaf.yaml")
NO_MEANING = "has no meaning with LOSS.NAME = 'ce' (it belongs to LOSS.NAME = 'focal')"


def test_a_key_of_what_a_later_file_replaces_is_left_out_and_named(caplog):
    again = replace(GAMMA, source="middle.yaml")
    assert build_config(SECTIONS, [FOCAL, GAMMA, again, CE]).LOSS == {"NAME": "ce"}
    assert caplog.messages == [f"middle.yaml: LOSS.GAMMA is left out: it {NO_MEANING}"]
    # It may get its meaning from a file between.
    of_middle = replace(FOCAL, source="middle.yaml")
    assert build_config(SECTIONS, [GAMMA, of_middle, CE]).LOSS == {"NAME": "ce"}


@pytest.mark.parametrize(
    "settings",
    [
        [GAMMA],
        [FOCAL, CE, replace(GAMMA, source="leaf.yaml")],
        [FOCAL, replace(GAMMA, source="leaf.yaml"), CE],
        [CE, replace(GAMMA, source="top.yaml")],
        [replace(CE, source="base.yaml"), GAMMA, CE],
    ],
)
def test_a_key_of_something_that_is_not_chosen_is_refused_with_its_source(settings):
    """It had no meaning at the end of any file."""
    with pytest.raises(ConfigError) as caught:
        build_config(SECTIONS, settings)
    source = next(setting.source for setting in settings if setting.key == "LOSS.GAMMA")
    assert str(caught.value) == f"{source}: LOSS.GAMMA {NO_MEANING}"


def test_a_misspelled_choice_is_said_before_the_keys_that_it_would_have_brought():
    with pytest.raises(ConfigError, match=r"LOSS.NAME = 'fokal' .*; did you mean 'focal'\?"):
        build("LOSS.GAMMA", "2", "LOSS.NAME", "fokal")


def toolkit():
    return CfgNode({"SOLVER": {"MAX_ITER": 90, "NESTEROV": False}, "LOSS": {"GAMMA": 3.0}})


def test_a_toolkits_keys_stand_beside_ours_which_win():
    cfg = build("SOLVER.NESTEROV", "True", toolkit=toolkit())
    assert cfg.SOLVER == {"MAX_ITER": 10, "NESTEROV": True}
    # A key of ours that is not read may be the toolkit's.
    assert build("LOSS.GAMMA", "2", toolkit=toolkit()).LOSS == {"NAME": "ce", "GAMMA": 2.0}


def test_a_change_takes_what_it_brings_and_leaves_what_it_ends():
    focal = build("LOSS.NAME", "focal", "LOSS.GAMMA", "2", "SOLVER.MAX_ITER", "7")
    other = changed_config(SECTIONS, focal, [Setting("LOSS.NAME", "ce", "a change")])
    assert other == build("SOLVER.MAX_ITER", "7")
    back = changed_config(SECTIONS, other, [Setting("LOSS.NAME", "focal", "a change")])
    assert back.LOSS == {"NAME": "focal", "GAMMA": 1.0}
    assert focal.LOSS.GAMMA == 2
    with pytest.raises(ConfigError, match=r"a change: LOSS.GAMMA has no meaning with LOSS.NAME"):
        changed_config(SECTIONS, other, [Setting("LOSS.GAMMA", 3, "a change")])


def test_a_change_leaves_the_toolkits_keys_alone():
    cfg = build("LOSS.GAMMA", "2", toolkit=toolkit())
    changed = changed_config(SECTIONS, cfg, [Setting("SOLVER.MAX_ITER", 3, "a change")])
    assert changed == build("LOSS.GAMMA", "2", "SOLVER.MAX_ITER", "3", toolkit=toolkit())


def test_a_toolkits_keys_have_its_own_rules():
    with pytest.raises(ConfigError, match=r"command line: SOLVER.NESTEROV = 'maybe' is not allo"):
        build("SOLVER.NESTEROV", "maybe", toolkit=toolkit())
    with pytest.raises(ConfigError, match=r"SOLVER.NESTER is .* did you mean SOLVER.NESTEROV\?"):
        build("SOLVER.NESTER", "True", toolkit=toolkit())


def test_values_are_found_by_their_full_names():
    assert value_of(build(), "SOLVER.MAX_ITER") == 10
    with pytest.raises(KeyError):
        value_of(build(), "SOLVER.MIN_ITER")
