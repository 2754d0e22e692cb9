"""A trained Faster R-CNN as plain torchvision weights, and the lines that load them.

`dense_export.py` prints those of dense detectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssod_imwa.detection.detectors.anchors import anchor_shapes
from ssod_imwa.detection.detectors.options import TIMM, DetectorOptions, FasterRCNNOptions
from ssod_imwa.detection.detectors.timm_bodies import find_maps
from ssod_imwa.engine.checkpoint.atomic import write_checkpoint

# Arguments of torchvision's FasterRCNN and their defaults.
DEFAULTS = {
    "min_size": 800,
    "max_size": 1333,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_test": 1000,
    "rpn_nms_thresh": 0.7,
    "box_score_thresh": 0.05,
    "box_nms_thresh": 0.5,
    "box_detections_per_img": 100,
    "size_divisible": 32,
}
ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))
ANCHOR_ASPECT_RATIOS = ((0.5, 1.0, 2.0),) * 5
# Channels of res2..res5.
STAGE_CHANNELS = {
    18: [64, 128, 256, 512],
    50: [256, 512, 1024, 2048],
    101: [256, 512, 1024, 2048],
}


def exported_state(
    state: Mapping[str, torch.Tensor], *, swap_input: bool
) -> dict[str, torch.Tensor]:
    """A detector's state as copies on the CPU, as torchvision loads it strictly.

    Batch norms' step counters are added where ours are frozen, because torchvision asks for them.

    Args:
        state: of a detector of torchvision's parts.
        swap_input: turn the first convolution's inputs around, for a detector of BGR images, since
            torchvision's takes RGB.
    """
    exported = {name: x.detach().cpu().clone() for name, x in state.items()}
    for name in [name for name in exported if name.endswith("running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        exported.setdefault(counter, torch.zeros((), dtype=torch.int64))
    if swap_input:
        name = next(
            n for n in exported if n.startswith("backbone.body.")
        )  # the first convolution's
        exported[name] = exported[name].flip(1).contiguous()
    return exported


def write_exported(
    path: Path,
    state: Mapping[str, torch.Tensor],
    *,
    min_size: int,
    max_size: int,
    about: Mapping[str, Any],
) -> None:
    """Write a state dict with what else a program has to know of a detector.

    Args:
        path: file to write: "model", and "input" with the next two.
        state: under the names of who is to load it.
        min_size: edge length in pixels to which the shorter edge is resized.
        max_size: bound on the longer edge.
        about: what else the file is to hold, see `Detector.export`.
    """
    content = {
        "model": {name: x.detach().cpu().clone() for name, x in state.items()},
        "input": {"min_size": min_size, "max_size": max_size},
        **about,
    }
    write_checkpoint(path, content)


def image_statistics(options: DetectorOptions) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue, for pixels in 0..1."""
    order = 1 if options.image.format == "RGB" else -1
    mean, std = (
        [float(f"{x / 255:.7g}") for x in values[::order]]
        for values in (options.pixels.pixel_mean, options.pixels.pixel_std)
    )
    return mean, std


def final_lines(options: DetectorOptions, path: str, *, background: bool) -> list[str]:
    """The lines that complete and fill `model`, and say what it takes and gives.

    Args:
        options: of the exported detector.
        path: of `write_exported`.
        background: whether label 0 is that of no class.
    """
    names = "['background', *content['classes']]" if background else "content['classes']"
    strides = [
        "for part in model.backbone.body.modules():",
        "    if hasattr(part, 'conv3'):",
        "        part.conv1.stride, part.conv2.stride = part.conv2.stride, part.conv1.stride",
    ]
    return [
        *(strides if options.resnets.stride_in_1x1 else []),
        f"content = torch.load({path!r}, weights_only=True)",
        "model.load_state_dict(content['model'])",
        "model.eval()",
        f"classes = {names}  # of labels 0, 1, ...",
        "input_size = content['input']  # pixels; the model resizes images itself,",
        "# without antialiasing: scores differ a little from those of the run where it does",
    ]


def loading_code(
    options: FasterRCNNOptions, num_classes: int, path: str, *, min_size: int, max_size: int
) -> str:
    """Python lines that make `model`, a torchvision FasterRCNN with the weights at `path`.

    Nothing of this package is imported. The model takes RGB images with values in 0..1, resizes
    them itself, and counts classes from 1.

    Args:
        options: of the exported detector.
        num_classes: C, without background.
        path: where the weights were written.
        min_size: edge length in pixels to which torchvision resizes the shorter edge.
        max_size: bound on the longer edge.
    """
    settings = _settings(options, min_size, max_size)
    arguments = [f"{k}={v!r}" for k, v in settings.items() if v != DEFAULTS[k]]
    lines = ["# Class 0 is background; labels count from 1.", "import torch"]
    sizes, ratios = anchor_shapes(options.anchor_generator, len(options.levels.levels) + 1)
    if (sizes, ratios) != (ANCHOR_SIZES, ANCHOR_ASPECT_RATIOS):
        lines.append("from torchvision.models.detection.anchor_utils import AnchorGenerator")
        arguments.append(f"rpn_anchor_generator=AnchorGenerator({sizes!r}, {ratios!r})")
    build = _stock_lines if _is_stock(options) else _general_lines
    lines += build(options, num_classes + 1, arguments)
    lines += _pool_lines(options.levels.levels)
    lines += final_lines(options, path, background=True)
    return "\n".join(lines) + "\n"


def _settings(options: FasterRCNNOptions, min_size: int, max_size: int) -> dict[str, object]:
    rpn, roi_heads = options.rpn, options.roi_heads
    mean, std = image_statistics(options)
    return {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": mean,
        "image_std": std,
        "rpn_pre_nms_top_n_test": rpn.pre_nms_topk_test,
        "rpn_post_nms_top_n_test": rpn.post_nms_topk_test,
        "rpn_nms_thresh": rpn.nms_thresh,
        "box_score_thresh": roi_heads.score_thresh_test,
        "box_nms_thresh": roi_heads.nms_thresh_test,
        "box_detections_per_img": options.detections.detections_per_image,
        "size_divisible": 2 ** max(options.levels.levels),
    }


def _is_stock(options: FasterRCNNOptions) -> bool:
    """Whether torchvision's builder makes this architecture."""
    head = options.roi_box_head
    sizes = (options.resnets.depth, options.fpn.out_channels, head.fc_dim, head.pooler_resolution)
    network = (options.backbone.name, options.levels.levels)
    return network == ("resnet", [2, 3, 4, 5]) and sizes == (50, 256, 1024, 7)


def _stock_lines(options: FasterRCNNOptions, labels: int, arguments: list[str]) -> list[str]:
    fixed = ["weights=None", "weights_backbone=None", f"num_classes={labels}"]
    return [
        "from torchvision.models.detection import fasterrcnn_resnet50_fpn",
        f"model = fasterrcnn_resnet50_fpn({', '.join(fixed + arguments)})",
    ]


def _general_lines(options: FasterRCNNOptions, labels: int, arguments: list[str]) -> list[str]:
    channels, head, levels = options.fpn.out_channels, options.roi_box_head, options.levels.levels
    resolution, fc_dim = head.pooler_resolution, head.fc_dim
    names = [str(number) for number in range(len(levels))]
    parts = [
        f"box_roi_pool=MultiScaleRoIAlign({names}, output_size={resolution}, sampling_ratio=2)",
        f"box_head=TwoMLPHead({channels * resolution**2}, {fc_dim})",
        f"box_predictor=FastRCNNPredictor({fc_dim}, {labels})",
    ]
    return [
        "from torchvision.models.detection.faster_rcnn import (",
        "    FasterRCNN, FastRCNNPredictor, TwoMLPHead)",
        "from torchvision.ops import MultiScaleRoIAlign",
        *backbone_lines(options, levels, "LastLevelMaxPool()"),
        f"model = FasterRCNN(backbone, {', '.join(parts + arguments)})",
    ]


def _pool_lines(levels: list[int]) -> list[str]:
    """What torchvision would guess from the first image, wrongly if it is much padded."""
    return [
        "from torchvision.ops.poolers import initLevelMapper",
        "pool = model.roi_heads.box_roi_pool",
        f"pool.scales = {[2.0**-level for level in levels]}",
        f"pool.map_levels = initLevelMapper({min(levels)}, {max(levels)})",
    ]


def backbone_lines(options: DetectorOptions, levels: list[int], extra_blocks: str) -> list[str]:
    """Python lines that make `backbone`, for torchvision's detectors.

    Args:
        options: of the exported detector.
        levels: of the maps that its pyramid stands on.
        extra_blocks: an expression of a class of torchvision's `feature_pyramid_network` that makes
            the coarser levels.
    """
    make = _resnet_lines if options.backbone.name == "resnet" else _timm_lines
    pooled = extra_blocks.partition("(")[0]
    return [
        f"from torchvision.ops.feature_pyramid_network import {pooled}",
        *make(options, levels, extra_blocks),
    ]


def _resnet_lines(options: DetectorOptions, levels: list[int], extra_blocks: str) -> list[str]:
    depth = options.resnets.depth
    layers = {f"layer{level - 1}": str(number) for number, level in enumerate(levels)}
    widths = [STAGE_CHANNELS[depth][level - 2] for level in levels]
    return [
        f"from torchvision.models import resnet{depth}",
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        f"backbone = BackboneWithFPN(resnet{depth}(weights=None), {layers}, {widths}, "
        f"{options.fpn.out_channels}, {extra_blocks})",
    ]


def _timm_lines(options: DetectorOptions, levels: list[int], extra_blocks: str) -> list[str]:
    name, channels = options.backbone.name.removeprefix(TIMM), options.fpn.out_channels
    maps = find_maps(name, levels)
    arguments = f"{name!r}, features_only=True, out_indices={maps.indices}"
    kept = maps.stages_kept
    return [
        "import timm",
        "from torchvision.ops import FeaturePyramidNetwork",
        "class Backbone(torch.nn.Module):",
        f"    out_channels = {channels}",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.body = timm.create_model({arguments})",
        *([] if kept is None else [f"        del self.body.blocks[{kept}:]"]),
        f"        self.fpn = FeaturePyramidNetwork({maps.channels}, {channels}, {extra_blocks})",
        "    def forward(self, images):",
        "        maps = enumerate(self.body(images))",
        "        return self.fpn({str(number): x for number, x in maps})",
        "backbone = Backbone()",
    ]
