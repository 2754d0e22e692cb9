"""Small FCOS and RetinaNet of torchvision's parts, and formulas for tests, one number at a time."""

import dataclasses
import math

import torch

from ssod_imwa.detection.data.records import Targets
from ssod_imwa.detection.detectors.fcos import TorchvisionFCOS
from ssod_imwa.detection.detectors.options import (
    AnchorOptions,
    BackboneOptions,
    FCOSHeadOptions,
    FCOSOptions,
    FPNOptions,
    ResNetOptions,
    RetinaNetHeadOptions,
    RetinaNetOptions,
)
from ssod_imwa.detection.detectors.retinanet import TorchvisionRetinaNet

CLASSES = 3
COMMON = {
    "backbone": BackboneOptions(freeze_at=0),
    "resnets": ResNetOptions(depth=18, norm="FrozenBN"),
    "fpn": FPNOptions(out_channels=64),
}
ANCHORS = AnchorOptions(
    sizes=[[12.0, 16.0], [24.0, 32.0], [48.0, 64.0], [96.0, 128.0], [192.0, 256.0]],
    aspect_ratios=[[1.0, 2.0]],
)
SIZES = [12.0, 24.0, 48.0, 96.0]
TARGETS = [
    Targets(
        torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 8.0, 60.0, 50.0], [30.0, 30.0, 44.0, 46.0]]),
        torch.tensor([2, 0, 0]),
    ),
    Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]
BACKGROUND = TARGETS[1:] * 2


def images(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


IMAGES = images((64, 96), (50, 70))


def fcos(common=COMMON, initial=False, **changes):
    torch.manual_seed(0)
    head = FCOSHeadOptions(num_convs=1, sizes_of_interest=SIZES, prior_prob=0.1)
    options = FCOSOptions(**common, fcos=dataclasses.replace(head, **changes))
    detector = TorchvisionFCOS(options, num_classes=CLASSES)
    return detector if initial else lively(detector)


def retinanet(common=COMMON, anchors=ANCHORS, initial=False, **changes):
    torch.manual_seed(0)
    head = dataclasses.replace(RetinaNetHeadOptions(prior_prob=0.1), **changes)
    options = RetinaNetOptions(**common, anchor_generator=anchors, retinanet=head)
    detector = TorchvisionRetinaNet(options, num_classes=CLASSES)
    return detector if initial else lively(detector)


def lively(detector):
    """Initial heads say nearly the same everywhere."""
    with torch.no_grad():
        for name, x in detector.head.named_parameters():
            if name.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight")):
                x.normal_(std=0.1)
            if name.endswith("scales"):
                x.copy_(torch.tensor([0.8, 1.1, 1.3, 0.9, 1.2])[: len(x)])
    return detector


BUILDERS = [fcos, retinanet]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def focal_by_hand(logits, labels, alpha=0.25, gamma=2.0):
    """The sum over locations, whose labels may be -1, and classes."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for number, logit in enumerate(row):
            p = sigmoid(logit)
            if label == number:
                total -= alpha * (1 - p) ** gamma * math.log(p)
            elif label >= 0:
                total -= (1 - alpha) * p**gamma * math.log(1 - p)
    return total


def overlap_by_hand(one, other):
    """IoU and GIoU of two boxes."""
    x1, y1, x2, y2 = one
    a1, b1, a2, b2 = other
    width, height = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
    intersection = max(width, 0) * max(height, 0)
    union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - intersection
    hull = (max(x2, a2) - min(x1, a1)) * (max(y2, b2) - min(y1, b1))
    return intersection / union, intersection / union - (hull - union) / hull


def centerness_by_hand(point, box):
    x, y = point
    x1, y1, x2, y2 = box
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
    return math.sqrt(ratio)


def cross_entropy(logit, target):
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)
