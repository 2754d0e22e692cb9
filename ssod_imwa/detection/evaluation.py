"""What a detector finds on a data set, and how good that is.

Example::

    images = DetectionImages.unlabeled(dataset)
    predictions = predict(model, dataset, build_test_batches(images, TestView(800, 1333), ...))
    metrics = evaluate_detections(dataset, predictions, voc=True)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from ssod_imwa.averaging.ranks import Group
from ssod_imwa.data.batches import Part
from ssod_imwa.data.loader import TestBatches
from ssod_imwa.data.polling import Poll, polled
from ssod_imwa.detection.coco_ap import coco_metrics
from ssod_imwa.detection.data.geometry import map_boxes
from ssod_imwa.detection.data.records import DetectionDataset, Detections, ImageRecord, View
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.voc_ap import voc_metrics
from ssod_imwa.errors import DataError

logger = logging.getLogger(__name__)


def evaluate_detections(
    dataset: DetectionDataset,
    predictions: Mapping[int | str, Detections],
    *,
    voc: bool = False,
) -> dict[str, float]:
    """COCO's and, if asked for, VOC's figures of a data set, in percent.

    The two count differently (see `coco_ap` and `voc_ap`), and published VOC results use either,
    so the names say which is which.

    Args:
        dataset: labeled images.
        predictions: detections of every image by its id, boxes in pixels of the stored image.
        voc: add VOC's figures.

    Returns:
        `AP, AP50, AP75, APs, APm, APl, AP-<class>`, and for `voc` `VOC/AP50, VOC/AP50-11pt,
        VOC/AP`; NaN where the data set has no object to find.

    Raises:
        DataError: an image has no labels.
        ValueError: the images of the data set and of the predictions differ.
    """
    truths = []
    for record in dataset.records:
        if record.annotations is None:
            raise DataError(
                f"data set {dataset.name!r} cannot be evaluated: image {record.image_id!r} has no "
                "labels (take a labeled data set for DATASETS.TEST)"
            )
        truths.append(record.annotations)
    ids = [record.image_id for record in dataset.records]
    missing, unknown = set(ids) - set(predictions), set(predictions) - set(ids)
    if missing or unknown:
        example = next(iter(missing or unknown))
        raise ValueError(
            f"predictions are of other images than data set {dataset.name!r} ({len(missing)} of "
            f"{len(ids)} missing, {len(unknown)} unknown, such as {example!r}); an image in which "
            "nothing was found has empty detections"
        )
    found = [predictions[image_id] for image_id in ids]
    if not any(map(len, found)):
        logger.warning(
            "nothing was found in any of the %d images of %s: no score is above the threshold of "
            "tests, or scores are no numbers because training diverged",
            len(found),
            dataset.name,
        )
    metrics = coco_metrics(truths, found, classes=dataset.classes)
    if voc:
        metrics |= voc_metrics(truths, found, num_classes=len(dataset.classes))
    return metrics


@torch.no_grad()
def predict(
    model: Detector,
    dataset: DetectionDataset,
    batches: TestBatches | Sequence[Part],
    processes: Group = Group(),
    *,
    poll: Poll | None = None,
) -> dict[int | str, Detections]:
    """A detector's findings by image id, boxes in pixels of the stored images, on the CPU.

    Args:
        model: runs on the device it is on; its training mode is left as it was.
        dataset: the images.
        batches: of this process, as the detector is to see them, see `build_test_batches`.
        processes: those that have the other images; all receive the findings of all.
        poll: see `polled`.
    """
    device = next(model.parameters()).device
    predictions: dict[int | str, Detections] = {}
    for batch in polled(batches, processes, poll):
        views = batch.views["image"]
        found = model.detect([view.image.to(device, non_blocking=True) for view in views])
        for index, view, detections in zip(batch.indices.tolist(), views, found, strict=True):
            record = dataset.records[index]
            predictions[record.image_id] = to_stored_image(detections, view, record)
    return {k: v for part in processes.all_gather(predictions) for k, v in part.items()}


def to_stored_image(found: Detections, view: View, record: ImageRecord) -> Detections:
    """Detections on a view as detections on the stored image, clipped to it, on the CPU."""
    boxes = map_boxes(
        found.boxes.detach().cpu(),
        torch.linalg.inv(view.matrix),
        height=record.height,
        width=record.width,
    )
    return Detections(boxes, found.labels.detach().cpu(), found.scores.detach().float().cpu())
