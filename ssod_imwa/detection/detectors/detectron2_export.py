"""A trained detector as a checkpoint and a configuration that detectron2 loads without us."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg as detectron2_cfg
from fvcore.common.config import CfgNode

from ssod_imwa.detection.detectors.export import write_exported
from ssod_imwa.engine.checkpoint.atomic import write_output
from ssod_imwa.errors import UserError


def export_model(
    state: Mapping[str, torch.Tensor],
    stock: CfgNode,
    path: Path,
    *,
    min_size: int,
    max_size: int,
    about: Mapping[str, Any],
) -> str:
    """Write a checkpoint and, beside it, a configuration of the same name with .yaml.

    Args:
        state: the model's.
        stock: what `stock_config` made.
        path: of the checkpoint.
        min_size: edge length in pixels to which images are resized.
        max_size: bound on the longer edge.
        about: what else the file is to hold, see `Detector.export`.

    Returns:
        Python lines that load them with nothing but detectron2.

    Raises:
        UserError: the configuration's file is there already, or a file cannot be written.
    """
    settings = path.with_suffix(".yaml")
    if settings.exists():
        raise UserError(f"{settings} is there already (remove it, or choose another name)")
    write_exported(path, state, min_size=min_size, max_size=max_size, about=about)
    stock = stock.clone()
    stock.INPUT.MIN_SIZE_TEST, stock.INPUT.MAX_SIZE_TEST = min_size, max_size
    # detectron2 takes relative paths from the working directory, not from the configuration's.
    stock.MODEL.WEIGHTS = str(path.absolute())
    del stock.MODEL["DEVICE"]  # the reader's, not this machine's
    moved = f"# If the files move, set MODEL.WEIGHTS to the new place of {path.name}.\n"
    write_output(settings, (moved + stock.dump()).encode())
    lines = [
        "import torch",
        "from detectron2.config import get_cfg",
        "from detectron2.engine import DefaultPredictor",
        "cfg = get_cfg()",
        f"cfg.merge_from_file({str(settings.absolute())!r})",
        "cfg.MODEL.DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'",
        "predictor = DefaultPredictor(cfg)  # takes a BGR image, uint8 (H, W, 3)",
        *_content_lines(path),
    ]
    return "\n".join(lines) + "\n"


def stock_config(cfg: CfgNode) -> CfgNode:
    """detectron2's own keys of a model: MODEL, the channel order, the number of detections."""
    stock = detectron2_cfg()
    _copy(cfg.MODEL, stock.MODEL)
    stock.INPUT.FORMAT = cfg.INPUT.FORMAT
    stock.TEST.DETECTIONS_PER_IMAGE = cfg.TEST.DETECTIONS_PER_IMAGE
    return stock


def lazy_loading_code(config: str, num_classes: int, path: Path) -> str:
    """The lines that load a checkpoint into the model of a LazyConfig."""
    load = "model_zoo.get_config"
    if Path(config).is_file():
        load, config = "LazyConfig.load", str(Path(config).absolute())
    lines = [
        "import torch",
        "from detectron2 import model_zoo",
        "from detectron2.checkpoint import DetectionCheckpointer",
        "from detectron2.config import LazyConfig, instantiate",
        f"lazy = {load}({config!r}).model",
        f"(lazy if 'num_classes' in lazy else lazy.roi_heads).num_classes = {num_classes}",
        "model = instantiate(lazy).eval()",
        f"DetectionCheckpointer(model).load({str(path.absolute())!r})",
        *_content_lines(path),
    ]
    return "\n".join(lines) + "\n"


def _content_lines(path: Path) -> list[str]:
    return [
        f"content = torch.load({str(path.absolute())!r}, weights_only=True)",
        "classes = content['classes']  # of pred_classes 0, 1, ...",
        "input_size = content['input']  # pixels: of the shorter edge, at most of the longer one",
    ]


def _copy(source: Any, target: Any) -> None:
    for key, value in target.items():
        if isinstance(value, dict):
            _copy(source[key], value)
        else:
            target[key] = source[key]
