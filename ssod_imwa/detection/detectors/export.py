"""A trained Faster R-CNN as plain torchvision weights, and the lines that load them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ssod_imwa.detection.detectors.faster_rcnn_modules import anchor_shapes
from ssod_imwa.detection.detectors.options import FasterRCNNOptions

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
        state: of a `TorchvisionFasterRCNN`.
        swap_input: turn the first convolution's inputs around, for a detector of BGR images, since
            torchvision's takes RGB.
    """
    exported = {name: x.detach().cpu().clone() for name, x in state.items()}
    for name in [name for name in exported if name.endswith("running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        exported.setdefault(counter, torch.zeros((), dtype=torch.int64))
    if swap_input:
        name = "backbone.body.conv1.weight"
        exported[name] = exported[name].flip(1).contiguous()
    return exported


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
    sizes, ratios = anchor_shapes(options.anchor_generator)
    if (sizes, ratios) != (ANCHOR_SIZES, ANCHOR_ASPECT_RATIOS):
        lines.append("from torchvision.models.detection.anchor_utils import AnchorGenerator")
        arguments.append(f"rpn_anchor_generator=AnchorGenerator({sizes!r}, {ratios!r})")
    build = _stock_lines if _is_stock(options) else _general_lines
    lines += build(options, num_classes + 1, arguments)
    if options.resnets.stride_in_1x1:
        lines += [
            "for part in model.backbone.body.modules():",
            "    if hasattr(part, 'conv3'):",
            "        part.conv1.stride, part.conv2.stride = part.conv2.stride, part.conv1.stride",
        ]
    lines += [f"model.load_state_dict(torch.load({path!r}, weights_only=True))", "model.eval()"]
    return "\n".join(lines) + "\n"


def _settings(options: FasterRCNNOptions, min_size: int, max_size: int) -> dict[str, object]:
    rpn, roi_heads, pixels = options.rpn, options.roi_heads, options.pixels
    mean, std = (
        [float(f"{x / 255:.7g}") for x in values]
        for values in (pixels.pixel_mean, pixels.pixel_std)
    )
    if options.image.format == "BGR":
        mean, std = mean[::-1], std[::-1]
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
    }


def _is_stock(options: FasterRCNNOptions) -> bool:
    """Whether torchvision's builder makes this architecture."""
    head = options.roi_box_head
    sizes = (options.resnets.depth, options.fpn.out_channels, head.fc_dim, head.pooler_resolution)
    return sizes == (50, 256, 1024, 7)


def _stock_lines(options: FasterRCNNOptions, labels: int, arguments: list[str]) -> list[str]:
    fixed = ["weights=None", "weights_backbone=None", f"num_classes={labels}"]
    return [
        "from torchvision.models.detection import fasterrcnn_resnet50_fpn",
        f"model = fasterrcnn_resnet50_fpn({', '.join(fixed + arguments)})",
    ]


def _general_lines(options: FasterRCNNOptions, labels: int, arguments: list[str]) -> list[str]:
    depth, channels, head = options.resnets.depth, options.fpn.out_channels, options.roi_box_head
    resolution, fc_dim = head.pooler_resolution, head.fc_dim
    parts = [
        "box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], "
        f"output_size={resolution}, sampling_ratio=2)",
        f"box_head=TwoMLPHead({channels * resolution**2}, {fc_dim})",
        f"box_predictor=FastRCNNPredictor({fc_dim}, {labels})",
    ]
    return [
        f"from torchvision.models import resnet{depth}",
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        "from torchvision.models.detection.faster_rcnn import (",
        "    FasterRCNN, FastRCNNPredictor, TwoMLPHead)",
        "from torchvision.ops import MultiScaleRoIAlign",
        "levels = {'layer1': '0', 'layer2': '1', 'layer3': '2', 'layer4': '3'}",
        f"body = resnet{depth}(weights=None)",
        f"backbone = BackboneWithFPN(body, levels, {STAGE_CHANNELS[depth]}, {channels})",
        f"model = FasterRCNN(backbone, {', '.join(parts + arguments)})",
    ]
