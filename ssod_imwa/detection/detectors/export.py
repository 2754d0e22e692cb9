"""A trained detector as plain torchvision weights, and the lines that load them."""

from __future__ import annotations

import torch

from ssod_imwa.detection.detectors.faster_rcnn import TorchvisionFasterRCNN

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


def exported_state(detector: TorchvisionFasterRCNN) -> dict[str, torch.Tensor]:
    """The weights as copies on the CPU, under torchvision's names and for its RGB images.

    Batch norms' step counters are added where ours are frozen, because torchvision's strict loading
    asks for them. A detector of BGR images gets its first convolution's inputs swapped instead.
    """
    state = {name: x.detach().cpu().clone() for name, x in detector.state_dict().items()}
    for name in [name for name in state if name.endswith("running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        state.setdefault(counter, torch.zeros((), dtype=torch.int64))
    if detector.image_format == "BGR":
        name = "backbone.body.conv1.weight"
        state[name] = state[name].flip(1).contiguous()
    return state


def loading_code(
    detector: TorchvisionFasterRCNN, path: str, *, min_size: int, max_size: int
) -> str:
    """Python lines that make `model`, a torchvision FasterRCNN with the weights at `path`.

    Nothing of this package is imported. The model takes RGB images with values in 0..1, resizes
    them itself, and counts classes from 1.

    Args:
        detector: the exported detector.
        path: where the weights were written.
        min_size: edge length in pixels to which torchvision resizes the shorter edge.
        max_size: bound on the longer edge.
    """
    settings = _settings(detector, min_size, max_size)
    given = [f"{k}={v!r}" for k, v in settings.items() if v != DEFAULTS[k]]
    lines = ["import torch"]
    anchors = detector.rpn.anchor_generator
    if (anchors.sizes, anchors.aspect_ratios) != (ANCHOR_SIZES, ANCHOR_ASPECT_RATIOS):
        lines.append("from torchvision.models.detection.anchor_utils import AnchorGenerator")
        given.append(
            f"rpn_anchor_generator=AnchorGenerator({anchors.sizes!r}, {anchors.aspect_ratios!r})"
        )
    build = _stock_lines if _is_stock(detector) else _general_lines
    lines += build(detector, given)
    if detector.stride_in_1x1:
        lines += [
            "for part in model.backbone.body.modules():",
            "    if hasattr(part, 'conv3'):",
            "        part.conv1.stride, part.conv2.stride = part.conv2.stride, part.conv1.stride",
        ]
    lines += [f"model.load_state_dict(torch.load({path!r}, weights_only=True))", "model.eval()"]
    return "\n".join(lines) + "\n"


def _settings(detector: TorchvisionFasterRCNN, min_size: int, max_size: int) -> dict[str, object]:
    rpn, roi_heads = detector.rpn, detector.roi_heads
    mean, std = (
        [float(f"{x / 255:.7g}") for x in values.flatten().tolist()]
        for values in (detector.pixel_mean, detector.pixel_std)
    )
    if detector.image_format == "BGR":
        mean, std = mean[::-1], std[::-1]
    return {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": mean,
        "image_std": std,
        "rpn_pre_nms_top_n_test": rpn._pre_nms_top_n["testing"],
        "rpn_post_nms_top_n_test": rpn._post_nms_top_n["testing"],
        "rpn_nms_thresh": rpn.nms_thresh,
        "box_score_thresh": roi_heads.score_thresh,
        "box_nms_thresh": roi_heads.nms_thresh,
        "box_detections_per_img": roi_heads.detections_per_img,
    }


def _is_stock(detector: TorchvisionFasterRCNN) -> bool:
    """Whether torchvision's builder makes this architecture."""
    sizes = (
        detector.depth,
        detector.backbone.out_channels,
        detector.roi_heads.box_head.fc6.out_features,
        detector.roi_heads.box_roi_pool.output_size[0],
    )
    return sizes == (50, 256, 1024, 7)


def _stock_lines(detector: TorchvisionFasterRCNN, given: list[str]) -> list[str]:
    arguments = ["weights=None", "weights_backbone=None", f"num_classes={detector.num_classes + 1}"]
    return [
        "from torchvision.models.detection import fasterrcnn_resnet50_fpn",
        f"model = fasterrcnn_resnet50_fpn({', '.join(arguments + given)})",
    ]


def _general_lines(detector: TorchvisionFasterRCNN, given: list[str]) -> list[str]:
    channels, head = detector.backbone.out_channels, detector.roi_heads.box_head
    resolution = detector.roi_heads.box_roi_pool.output_size[0]
    inputs = [level[0].in_channels for level in detector.backbone.fpn.inner_blocks]
    fc_dim, classes = head.fc6.out_features, detector.num_classes + 1
    parts = [
        "box_roi_pool=MultiScaleRoIAlign(['0', '1', '2', '3'], "
        f"output_size={resolution}, sampling_ratio=2)",
        f"box_head=TwoMLPHead({head.fc6.in_features}, {fc_dim})",
        f"box_predictor=FastRCNNPredictor({fc_dim}, {classes})",
    ]
    return [
        f"from torchvision.models import resnet{detector.depth}",
        "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
        "from torchvision.models.detection.faster_rcnn import (",
        "    FasterRCNN, FastRCNNPredictor, TwoMLPHead)",
        "from torchvision.ops import MultiScaleRoIAlign",
        "levels = {'layer1': '0', 'layer2': '1', 'layer3': '2', 'layer4': '3'}",
        f"body = resnet{detector.depth}(weights=None)",
        f"backbone = BackboneWithFPN(body, levels, {inputs}, {channels})",
        f"model = FasterRCNN(backbone, {', '.join(parts + given)})",
    ]
