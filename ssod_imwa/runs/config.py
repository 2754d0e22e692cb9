"""The configuration of a run: every section there is, and reading it from files and overrides."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from ssod_imwa.classification import keys as classification
from ssod_imwa.config import shared
from ssod_imwa.config.naming import output_folder
from ssod_imwa.config.reader import (
    COMMAND_LINE,
    Setting,
    build_config,
    changed_config,
    file_settings,
    keys,
    override_settings,
    text_settings,
    value_of,
    without,
)
from ssod_imwa.config.sections import active_sections, build_tree, options_by_key
from ssod_imwa.config.shared import check_shared
from ssod_imwa.detection import keys as detection
from ssod_imwa.errors import ConfigError

logger = logging.getLogger(__name__)

CHAPTERS = {
    "Both tasks": shared.SECTIONS,
    "Detection": detection.SECTIONS,
    "Classification": classification.SECTIONS,
}
SECTIONS = tuple(section for sections in CHAPTERS.values() for section in sections)
# Keys that change neither weights nor data order: a resumed run may change them.
FREE_KEYS = frozenset(key for key, option in options_by_key(SECTIONS).items() if option.free)
# Keys that count a member's own iterations: a longer or shorter run multiplies them.
ITERATION_KEYS = frozenset(
    key for key, option in options_by_key(SECTIONS).items() if option.iterations
)
# Keys that are a moving average's decay an iteration.
DECAY_KEYS = frozenset(key for key, option in options_by_key(SECTIONS).items() if option.decay)
# Keys in which members may differ.
PER_MEMBER_KEYS = frozenset(
    key for key, option in options_by_key(SECTIONS).items() if option.per_member
)

TOOLKIT = "MODEL.TOOLKIT"
TOOLKIT_CONFIG = "MODEL.DETECTRON2.CONFIG"


def get_cfg() -> CfgNode:
    """The configuration of a run that sets nothing."""
    return build_config(SECTIONS, [])


def defaults_of(cfg: CfgNode) -> CfgNode:
    """The defaults of the keys that have a meaning for what a configuration trains."""
    values = {key: value_of(cfg, key) for key in keys(cfg)}
    return build_tree(active_sections(SECTIONS, values))


def load_config(
    paths: str | Path | Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> CfgNode:
    """The default configuration changed by YAML files and by KEY VALUE pairs, frozen.

    Args:
        paths: a YAML file, or several that are merged left to right; the `_BASE_` key of each names
            files, relative to itself, that are read before it. Unless one sets OUTPUT_DIR, it is
            made of their names: see `naming.output_folder`.
        overrides: alternating keys and values, such as `["SOLVER.MAX_ITER", "600"]`.

    Raises:
        ConfigError: a file is missing or no YAML, a key is unknown or has no meaning for what is
            trained (see `build_config`), a value is not allowed.

    Example:
        >>> load_config(overrides=["IMWA.MEMBERS", "2", "SOLVER.MAX_ITER", "600"]).IMWA.MEMBERS
        2
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    settings: list[Setting] = []
    if files:
        settings.append(Setting("OUTPUT_DIR", output_folder(files), "names of the files"))
    for file in files:
        settings += file_settings(file)
    settings += override_settings(overrides)
    detector = {setting.key: setting.value for setting in settings}.get(TOOLKIT_CONFIG, "")
    cfg = _build(settings, " + ".join(map(str, files)) or COMMAND_LINE, detector=str(detector))
    _refuse_replaced(cfg, settings)
    return cfg


def parse_config(text: str, source: str) -> CfgNode:
    """The configuration that `cfg.dump()` wrote, checked and frozen.

    Args:
        text: YAML of keys and values, without `_BASE_`.
        source: where it comes from, for errors.

    Raises:
        ConfigError: as `load_config`.
    """
    # A dump holds every key: the file that the detector was described by is not needed again.
    return _build(text_settings(text, source), source, detector="")


def _build(settings: Sequence[Setting], source: str, *, detector: str) -> CfgNode:
    toolkit = _toolkit_tree(settings, detector)
    cfg = build_config(SECTIONS, settings, toolkit=toolkit)
    if toolkit is not None:
        _warn_of_unread(cfg, toolkit, settings)
    check_shared(cfg, source)
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)  # no folder with the name "~"
    # In one form, so that what a resume compares does not depend on how blocks were written.
    cfg.IMWA.MEMBER_OVERRIDES = [
        {key: value_of(own, key) for key in block}
        for own, block in zip(member_configs(cfg, source), cfg.IMWA.MEMBER_OVERRIDES, strict=True)
    ]
    cfg.freeze()
    return cfg


def _refuse_replaced(cfg: CfgNode, settings: Sequence[Setting]) -> None:
    """Refuse iterations that are set after epochs, which go on counting in their place.

    Before them they had a meaning until epochs came; a dump, which is one source, has both.

    Raises:
        ConfigError: one is there.
    """
    epochs = value_of(cfg, classification.EPOCHS) if cfg.TASK == "classification" else 0
    if not epochs:
        return
    last = {setting.key: number for number, setting in enumerate(settings)}
    place = last[classification.EPOCHS]
    for number in (last.get(key, -1) for key in classification.REPLACED_BY_EPOCHS):
        setting = settings[number]
        is_dump = setting.source == settings[place].source != COMMAND_LINE
        if number > place and not is_dump:
            raise ConfigError(
                f"{setting.source}: {setting.key} has no meaning with {classification.EPOCHS} = "
                f"{epochs:g} (CLS.SCHEDULE takes its place: set that, or EPOCHS to 0)"
            )


def member_configs(cfg: CfgNode, source: str = COMMAND_LINE) -> list[CfgNode]:
    """The configuration of each member as IMWA.MEMBER_OVERRIDES says, frozen; [] if it is empty.

    Args:
        cfg: of the run, also one that a task has completed.
        source: where it comes from, for errors.

    Raises:
        ConfigError: a key is unknown, has no meaning for what the member trains or cannot differ
            between members, or a value is not allowed.
    """
    blocks = cfg.IMWA.MEMBER_OVERRIDES
    return [_member_config(cfg, m, block, source) for m, block in enumerate(blocks)]


def _member_config(cfg: CfgNode, member: int, block: dict[str, Any], source: str) -> CfgNode:
    where = f"{source}: IMWA.MEMBER_OVERRIDES, member {member}"
    settings = [Setting(key, value, where) for key, value in block.items()]
    known = {*options_by_key(SECTIONS), *keys(cfg)}
    for key in block:
        if key in known - PER_MEMBER_KEYS:
            allowed = ", ".join(key for key in keys(cfg) if key in PER_MEMBER_KEYS)
            raise ConfigError(f"{where}: {key} cannot differ between members (what can: {allowed})")
    own = changed_config(SECTIONS, cfg, settings)
    check_shared(own, where)
    own.freeze()
    return own


def _warn_of_unread(cfg: CfgNode, toolkit: CfgNode, settings: Sequence[Setting]) -> None:
    """Say which of a toolkit's keys are set to no effect: its detector alone is made of them."""
    foreign = set(keys(toolkit)) - options_by_key(SECTIONS).keys()
    unread = sorted(
        key
        for key in {setting.key for setting in settings} & foreign
        if not key.startswith(("MODEL.", "VIS_PERIOD"))
        and value_of(cfg, key) != value_of(toolkit, key)
    )
    if unread:
        logger.warning(
            "%s: set to no effect (of detectron2's own keys MODEL and what else builds the "
            "detector is read)",
            ", ".join(unread),
        )


def _toolkit_tree(settings: Sequence[Setting], detector: str) -> CfgNode | None:
    """The keys of the toolkit that makes the detector, if it has keys of its own."""
    values = {setting.key: setting.value for setting in settings}
    if values.get("TASK", "detection") != "detection" or values.get(TOOLKIT) != "detectron2":
        return None
    try:
        from ssod_imwa.detection.detectors.detectron2_config import detector_tree
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ConfigError(
            f"{TOOLKIT} = 'detectron2': detectron2 is not installed (see docs/detectron2.md, or "
            "choose torchvision)"
        ) from None
    # Of what trains, its keys mean nothing: ours do, or are refused.
    return without(detector_tree(detector), options_by_key(shared.SECTIONS))
