"""Sheets that show what a detector finds and what a method trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ssod_imwa.detection.data.records import Annotations, Detections, View
from ssod_imwa.detection.pseudo_labels import filter_detections, move_detections
from ssod_imwa.visualization.pictures import contact_sheet, draw_detections


def truth_picture(
    image: torch.Tensor, annotations: Annotations, class_names: Sequence[str]
) -> torch.Tensor:
    """An image with its ground truth, dashed; crowds and difficult boxes say so."""
    notes = [
        "crowd" if crowd else "difficult" if difficult else ""
        for crowd, difficult in zip(annotations.crowd, annotations.difficult, strict=True)
    ]
    boxes, labels = torch.from_numpy(annotations.boxes), torch.from_numpy(annotations.labels)
    return draw_detections(image, boxes, labels, class_names, notes=notes, style="dashed")


def detections_picture(
    image: torch.Tensor, detections: Detections, class_names: Sequence[str], *, threshold: float
) -> torch.Tensor:
    """An image with the detections above a score."""
    drawn = filter_detections(detections, threshold)
    return draw_detections(image, drawn.boxes, drawn.labels, class_names, scores=drawn.scores)


def prediction_sheet(
    images: Sequence[torch.Tensor],
    truths: Sequence[Annotations],
    predictions: Sequence[Detections],
    names: Sequence[str],
    *,
    class_names: Sequence[str],
    threshold: float,
) -> torch.Tensor:
    """Pairs of pictures: ground truth on the left, detections on the right.

    Args:
        images: uint8 (3, H, W), as stored.
        truths: labels of each image.
        predictions: detections of each image, in its pixels.
        names: for the captions.
        class_names: names of the classes 0..C-1.
        threshold: only detections above this score are drawn.

    Returns:
        uint8 (3, H, W).
    """
    pictures, captions = [], []
    for image, truth, detections, name in zip(images, truths, predictions, names, strict=True):
        pictures += [
            truth_picture(image, truth, class_names),
            detections_picture(image, detections, class_names, threshold=threshold),
        ]
        count = len(filter_detections(detections, threshold))
        captions += [
            f"image {name}: {len(truth)} labeled",
            f"{count} found with a score above {threshold:g}",
        ]
    return contact_sheet(pictures, captions, group=2)


def view_sheet(
    views: Sequence[Mapping[str, View]],
    pseudo_labels: Sequence[Detections | None],
    names: Sequence[str],
    *,
    class_names: Sequence[str],
) -> torch.Tensor:
    """Pairs of pictures: weak view on the left, strong view on the right, with training's boxes.

    Args:
        views: "weak" and "strong" of each image; labeled ones show their labels, dashed.
        pseudo_labels: of each image, in pixels of its weak view; None for labeled images.
        names: for the captions.
        class_names: names of the classes 0..C-1.

    Returns:
        uint8 (3, H, W).
    """
    pictures, captions = [], []
    for of_image, detections, name in zip(views, pseudo_labels, names, strict=True):
        weak, strong = of_image["weak"], of_image["strong"]
        on_strong = None if detections is None else move_detections(detections, weak, strong)
        pictures += [
            _view_picture(weak, detections, class_names),
            _view_picture(strong, on_strong, class_names),
        ]
        kind = "label" if detections is None else "pseudo-label"
        count = len(weak.targets or ()) if detections is None else len(detections)
        boxes = f"{count} {kind}{'' if count == 1 else 's'}"
        captions += [f"image {name}: weak view, {boxes}", "strong view"]
    return contact_sheet(pictures, captions, group=2)


def _view_picture(
    view: View, detections: Detections | None, class_names: Sequence[str]
) -> torch.Tensor:
    if detections is not None:
        boxes, labels = detections.boxes, detections.labels
        return draw_detections(view.image, boxes, labels, class_names, scores=detections.scores)
    targets = view.targets
    boxes = torch.zeros(0, 4) if targets is None else targets.boxes
    labels = torch.zeros(0, dtype=torch.int64) if targets is None else targets.labels
    return draw_detections(view.image, boxes, labels, class_names, style="dashed")


def evenly_spaced(count: int, size: int) -> list[int]:
    """Positions of `count` items spread over `size`, all of them if there are no more.

    Example:
        >>> evenly_spaced(3, 9), evenly_spaced(5, 2)
        ([0, 3, 6], [0, 1])
    """
    count = min(count, size)
    return [i * size // count for i in range(count)]
