"""How good a teacher's boxes are, where the images' own labels were only taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchvision.ops import box_iou

from ssod_imwa.detection.data.records import Annotations, Detections

IOU = 0.5  # a label is right from here on, as in AP50


@dataclass(frozen=True)
class JudgedLabels:
    """Labels of images beside their truth.

    Attributes:
        right: bool (n,), whether the label is of an object's class and lies on it.
        judged: bool (n,), False where the truth is not known, and on regions that count for
            nothing (crowds, difficult objects).
        objects: int64 (m,), classes of the true objects.
    """

    right: torch.Tensor
    judged: torch.Tensor
    objects: torch.Tensor


def judge_labels(
    detections: Sequence[Detections],
    truths: Sequence[Annotations | None],
    passed: Sequence[torch.Tensor],
) -> JudgedLabels:
    """Compare labels with the truth, by falling score, each object being met once.

    Args:
        detections: of each image, by falling score, boxes in pixels of the stored image, on the
            CPU.
        truths: annotations of each image in these pixels, None where they are not known.
        passed: bool (n,) of each image; what did not pass meets no object and is not judged.
    """
    images = zip(detections, truths, passed, strict=True)
    parts = [_judge(item, truth, keep.cpu()) for item, truth, keep in images]
    return JudgedLabels(
        torch.cat([part.right for part in parts]),
        torch.cat([part.judged for part in parts]),
        torch.cat([part.objects for part in parts]),
    )


def _judge(detections: Detections, truth: Annotations | None, passed: torch.Tensor) -> JudgedLabels:
    count = len(detections)
    right = torch.zeros(count, dtype=torch.bool)
    if truth is None:
        return JudgedLabels(right, right.clone(), torch.empty(0, dtype=torch.int64))
    judged = passed.clone()
    labels = torch.from_numpy(truth.labels)
    ignored = torch.from_numpy(truth.crowd | truth.difficult)
    overlaps = box_iou(detections.boxes, torch.from_numpy(truth.boxes))
    overlaps[detections.labels[:, None] != labels[None]] = 0
    is_free = ~ignored
    for i in passed.nonzero().flatten().tolist():
        row = overlaps[i]
        reached = row >= IOU
        if (candidates := reached & is_free).any():
            best = int(torch.where(candidates, row, -1.0).argmax())
            right[i], is_free[best] = True, False
        elif (reached & ignored).any():
            judged[i] = False
    return JudgedLabels(right, judged, labels[~ignored])
