"""A trained detector as a checkpoint and a configuration that detectron2 loads without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg as detectron2_cfg
from fvcore.common.config import CfgNode

from ssod_imwa.detection.detectors.detectron2 import Detectron2Detector
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint, write_text

INPUT_KEYS = ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST")


def export_detector(detector: Detectron2Detector, cfg: CfgNode, path: Path) -> str:
    """Write a checkpoint and, beside it, a configuration of the same name with .yaml.

    Args:
        detector: what is exported.
        cfg: of the run.
        path: of the checkpoint.

    Returns:
        Python lines that load them with nothing but detectron2.
    """
    state = {name: x.detach().cpu().clone() for name, x in detector.model.state_dict().items()}
    write_checkpoint(path, {"model": state})
    if cfg.MODEL.DETECTRON2.CONFIG.endswith(".py"):
        return _lazy_code(cfg.MODEL.DETECTRON2.CONFIG, detector.num_classes, path)
    settings = path.with_suffix(".yaml")
    write_text(settings, stock_config(cfg, detector.num_classes, path).dump(), kind="config")
    lines = [
        "from detectron2.config import get_cfg",
        "from detectron2.engine import DefaultPredictor",
        "cfg = get_cfg()",
        f"cfg.merge_from_file({str(settings)!r})",
        "predictor = DefaultPredictor(cfg)  # takes a BGR image, uint8 (H, W, 3)",
    ]
    return "\n".join(lines) + "\n"


def stock_config(cfg: CfgNode, num_classes: int, weights: Path) -> CfgNode:
    """detectron2's own configuration of the detector: MODEL, and INPUT and TEST for inference."""
    stock = detectron2_cfg()
    _copy(cfg.MODEL, stock.MODEL)
    for key in INPUT_KEYS:
        stock.INPUT[key] = cfg.INPUT[key]
    stock.TEST.DETECTIONS_PER_IMAGE = cfg.TEST.DETECTIONS_PER_IMAGE
    stock.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    stock.MODEL.RETINANET.NUM_CLASSES = num_classes
    stock.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    stock.MODEL.WEIGHTS = str(weights)
    return stock


def _copy(source: Any, target: Any) -> None:
    for key, value in target.items():
        if isinstance(value, dict):
            _copy(source[key], value)
        else:
            target[key] = source[key]


def _lazy_code(config: str, num_classes: int, path: Path) -> str:
    load = "LazyConfig.load" if Path(config).is_file() else "model_zoo.get_config"
    lines = [
        "from detectron2 import model_zoo",
        "from detectron2.checkpoint import DetectionCheckpointer",
        "from detectron2.config import LazyConfig, instantiate",
        f"lazy = {load}({config!r}).model",
        f"(lazy if 'num_classes' in lazy else lazy.roi_heads).num_classes = {num_classes}",
        "model = instantiate(lazy).eval()",
        f"DetectionCheckpointer(model).load({str(path)!r})",
    ]
    return "\n".join(lines) + "\n"
