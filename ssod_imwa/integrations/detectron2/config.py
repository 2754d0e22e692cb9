"""Our configuration keys in detectron2's tree."""

from __future__ import annotations

from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_cfg

from ssod_imwa.config.defaults import get_cfg
from ssod_imwa.config.reader import keys
from ssod_imwa.errors import ConfigError

# Keys that mean the same in both trees and whose values the detector's configuration gives.
MODEL_INPUT = "INPUT.FORMAT"
# What our runs decide, whatever detectron2's configuration of the detector says.
OURS = ("MODEL.DEVICE", "MODEL.ROI_HEADS.NUM_CLASSES")


def add_ssod_imwa_config(cfg: CfgNode) -> None:
    """Add this package's keys and their defaults to a detectron2 configuration.

    Keys that detectron2 has, too, keep its values.

    Example::

        cfg = detectron2.config.get_cfg()
        add_ssod_imwa_config(cfg)
        cfg.merge_from_file(args.config_file)   # may hold IMWA and SSOD now
    """
    _add(cfg, get_cfg())


def _add(cfg: CfgNode, ours: CfgNode) -> None:
    for key, value in ours.items():
        if not isinstance(value, dict):
            cfg.setdefault(key, value)
            continue
        if key not in cfg:
            cfg[key] = CfgNode()
        _add(cfg[key], value)


def toolkit_config(detector: str) -> CfgNode:
    """The tree of a run with `MODEL.TOOLKIT: detectron2`.

    MODEL and INPUT.FORMAT are detectron2's; every other key that both have is ours.

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
    add_ssod_imwa_config(cfg)
    _replace(cfg, get_cfg(), "")
    cfg.MODEL.TOOLKIT = "detectron2"
    return cfg


def foreign_keys() -> frozenset[str]:
    """Keys of `toolkit_config` whose values detectron2 defines."""
    theirs, ours = set(keys(detectron2_cfg())), set(keys(get_cfg()))
    detectors = {key for key in theirs if key.startswith("MODEL.") and key not in OURS}
    return frozenset(theirs - ours | detectors)


def _replace(cfg: CfgNode, ours: CfgNode, prefix: str) -> None:
    for key, value in ours.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _replace(cfg[key], value, f"{name}.")
        elif name in OURS or not (name.startswith("MODEL.") or name == MODEL_INPUT):
            cfg[key] = value


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
