"""Our configuration keys in detectron2's tree."""

from __future__ import annotations

import copy
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

from ssod_imwa.config import shared
from ssod_imwa.config.options import options_by_key
from ssod_imwa.detection import keys as detection
from ssod_imwa.errors import ConfigError


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


def detector_tree(detector: str) -> CfgNode:
    """detectron2's configuration with the MODEL keys and INPUT.FORMAT of a detector.

    Args:
        detector: MODEL.DETECTRON2.CONFIG, a YAML of the model zoo or a file; a LazyConfig (.py)
            describes its detector by itself and changes no key.

    Raises:
        ConfigError: there is no such configuration.
    """
    cfg = detectron2_cfg()
    if detector and not detector.endswith(".py"):
        source = _zoo_config(detector)
        cfg.MODEL, cfg.INPUT.FORMAT = source.MODEL, source.INPUT.FORMAT
    return cfg


def _zoo_config(detector: str) -> CfgNode:
    cfg = detectron2_cfg()
    try:
        path = detector if Path(detector).is_file() else model_zoo.get_config_file(detector)
        cfg.merge_from_file(path)
    except RuntimeError as error:
        raise ConfigError(
            f"MODEL.DETECTRON2.CONFIG = {detector!r} is not allowed (must be a file, or one of "
            f"detectron2's model zoo, such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml)"
        ) from error
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"MODEL.DETECTRON2.CONFIG = {detector!r}: {error}") from error
    return cfg
