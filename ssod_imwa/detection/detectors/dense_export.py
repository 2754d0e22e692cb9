"""The lines that make plain torchvision models of an exported FCOS or RetinaNet.

torchvision's models put the points and anchors of p6 and p7 too close together unless images are
padded to multiples of 128, have no scale for each level, and choose FCOS's candidates by the
product of class probability and quality. The printed lines set the first two right from outside and
hide what is not above the threshold of class probability, so that detections are those of our
model.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssod_imwa.detection.detectors.anchors import anchor_shapes
from ssod_imwa.detection.detectors.export import backbone_lines, final_lines, image_statistics
from ssod_imwa.detection.detectors.options import DetectorOptions, FCOSOptions, RetinaNetOptions


def fcos_loading_code(
    options: FCOSOptions,
    num_classes: int,
    path: str,
    *,
    scales: Sequence[float],
    min_size: int,
    max_size: int,
) -> str:
    """Python lines that make `model`, a torchvision FCOS with the weights at `path`.

    Nothing of this package is imported. The model takes RGB images with values in 0..1, resizes
    them itself, and counts classes from 0.

    Args:
        options: of the exported detector.
        num_classes: C.
        path: where the weights were written, without the scales.
        scales: of the levels, all above 0.
        min_size: edge length in pixels to which torchvision resizes the shorter edge.
        max_size: bound on the longer edge.
    """
    fcos, strides = options.fcos, options.levels.strides
    arguments = [
        *_common_arguments(options, num_classes, min_size, max_size),
        f"anchor_generator=Anchors({[(stride,) for stride in strides]}, "
        f"((1.0,),) * {len(strides)})",
        f"head=FCOSHead({options.fpn.out_channels}, 1, {num_classes}, {fcos.num_convs})",
        "score_thresh=0.0",
        f"nms_thresh={fcos.nms_thresh_test!r}",
        f"topk_candidates={fcos.topk_candidates_test}",
    ]
    sizes = [scale * stride for scale, stride in zip(scales, strides, strict=True)]
    lines = [
        *_backbone_lines(options),
        "from torchvision.models.detection.fcos import FCOS, FCOSHead",
        f"model = FCOS({', '.join(arguments)})",
        "# The learned scale of each level is the size of its anchors.",
        "model.anchor_generator.cell_anchors = [",
        f"    torch.tensor([[-size, -size, size, size]]) / 2 for size in {sizes!r}]",
        "def hide(module, inputs, outputs):",
        "    logits = outputs['cls_logits']",
        f"    low = logits.sigmoid() <= {fcos.score_thresh_test!r}",
        "    return {**outputs, 'cls_logits': logits.masked_fill(low, float('-inf'))}",
        "model.head.register_forward_hook(hide)",
    ]
    return _code(lines, options, path)


def retinanet_loading_code(
    options: RetinaNetOptions, num_classes: int, path: str, *, min_size: int, max_size: int
) -> str:
    """Python lines that make `model`, a torchvision RetinaNet with the weights at `path`.

    Args: as of `fcos_loading_code`.
    """
    retinanet = options.retinanet
    sizes, ratios = anchor_shapes(options.anchor_generator, len(options.levels.strides))
    norm = "partial(torch.nn.GroupNorm, 32)" if retinanet.norm == "GN" else "None"
    places = len(sizes[0]) * len(ratios[0])
    head = f"{options.fpn.out_channels}, {places}, {num_classes}, norm_layer={norm}"
    arguments = [
        *_common_arguments(options, num_classes, min_size, max_size),
        f"anchor_generator=Anchors({sizes!r}, {ratios!r})",
        f"head=RetinaNetHead({head})",
        f"score_thresh={retinanet.score_thresh_test!r}",
        f"nms_thresh={retinanet.nms_thresh_test!r}",
        f"topk_candidates={retinanet.topk_candidates_test}",
    ]
    lines = [
        *_backbone_lines(options),
        "from functools import partial",
        "from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead",
        f"model = RetinaNet({', '.join(arguments)})",
    ]
    return _code(lines, options, path)


def _common_arguments(
    options: FCOSOptions | RetinaNetOptions, num_classes: int, min_size: int, max_size: int
) -> list[str]:
    mean, std = image_statistics(options)
    return [
        "backbone",
        str(num_classes),
        f"min_size={min_size}",
        f"max_size={max_size}",
        f"image_mean={mean!r}",
        f"image_std={std!r}",
        f"detections_per_img={options.detections.detections_per_image}",
        f"size_divisible={2 ** max(options.levels.levels)}",
    ]


def _backbone_lines(options: FCOSOptions | RetinaNetOptions) -> list[str]:
    channels = options.fpn.out_channels
    return [
        *backbone_lines(options, options.levels.levels, f"LastLevelP6P7({channels}, {channels})"),
        "from torchvision.models.detection.anchor_utils import AnchorGenerator",
        "class Anchors(AnchorGenerator):",
        "    def grid_anchors(self, grid_sizes, strides):",
        f"        strides = [[torch.tensor(stride)] * 2 for stride in {options.levels.strides}]",
        "        return super().grid_anchors(grid_sizes, strides)",
    ]


def _code(lines: list[str], options: DetectorOptions, path: str) -> str:
    code = ["# Labels count from 0.", "import torch", *lines]
    code += final_lines(options, path, background=False)
    return "\n".join(code) + "\n"
