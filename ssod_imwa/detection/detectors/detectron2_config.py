"""The configuration keys of detectron2's detectors."""

from __future__ import annotations

from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from ssod_imwa.errors import ConfigError


def detector_tree(detector: str) -> CfgNode:
    """detectron2's configuration with the MODEL keys and INPUT.FORMAT of a detector.

    Args:
        detector: MODEL.DETECTRON2.CONFIG, a YAML of the model zoo or a file; a LazyConfig (.py)
            describes its detector by itself and changes no key.

    Raises:
        ConfigError: there is no such configuration.
    """
    cfg = get_cfg()
    if detector and not detector.endswith(".py"):
        source = _zoo_config(detector)
        cfg.MODEL, cfg.INPUT.FORMAT = source.MODEL, source.INPUT.FORMAT
    return cfg


def _zoo_config(detector: str) -> CfgNode:
    cfg = get_cfg()
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
