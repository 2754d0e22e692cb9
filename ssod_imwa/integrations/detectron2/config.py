"""Our configuration keys in detectron2's tree."""

from __future__ import annotations

import copy

from detectron2.config import CfgNode

from ssod_imwa.config import shared
from ssod_imwa.config.sections import options_by_key
from ssod_imwa.detection import keys as detection


def add_ssod_imwa_config(cfg: CfgNode) -> None:
    """Add this package's keys and their defaults to a detectron2 configuration.

    Those of every method of detection: which of them is trained is not known yet. Keys that
    detectron2 has, too, keep its values.

    Example::

        cfg = detectron2.config.get_cfg()
        add_ssod_imwa_config(cfg)
        cfg.merge_from_file(args.config_file)   # may hold IMWA and SSOD now
    """
    sections = [
        section
        for section in (*shared.SECTIONS, *detection.SECTIONS)
        if "detectron2" in section.when.get("MODEL.TOOLKIT", ("detectron2",))
    ]
    for key, option in options_by_key(sections).items():
        *groups, leaf = key.split(".")
        node = cfg
        for group in groups:
            node = node.setdefault(group, CfgNode())
        node.setdefault(leaf, copy.deepcopy(option.default))
