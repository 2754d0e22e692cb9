"""Our data sets in detectron2's catalogs, and its evaluators on our detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from ssod_imwa.detection.data.catalog import load_dataset
from ssod_imwa.detection.data.records import Annotations, DetectionDataset, Detections
from ssod_imwa.errors import DataError


def register_in_detectron2(names: Sequence[str], *, root: str | Path | None = None) -> None:
    """Register data sets of our catalog in DatasetCatalog and MetadataCatalog.

    Args:
        names: as `load_dataset` takes them; detectron2 must not have them yet.
        root: folder of all data sets.

    Raises:
        DataError: a name is not known or its files are missing, or detectron2 has it already.

    Example::

        register_in_detectron2(["digits_train", "digits_test"])
        cfg.DATASETS.TRAIN = ("digits_train",)
    """
    taken = sorted(set(names) & set(DatasetCatalog.list()))
    if taken:
        raise DataError(f"detectron2 has data sets of the names {', '.join(taken)} already")
    for name in names:
        dataset = load_dataset(name, root=root)
        DatasetCatalog.register(name, lambda dataset=dataset: detectron2_dicts(dataset))
        MetadataCatalog.get(name).set(thing_classes=list(dataset.classes), evaluator_type="coco")


def detectron2_dicts(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """The images of a data set in detectron2's standard format."""
    return [
        {
            "file_name": record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "annotations": [] if record.annotations is None else _objects(record.annotations),
        }
        for record in dataset.records
    ]


def _objects(annotations: Annotations) -> list[dict[str, Any]]:
    columns = (annotations.boxes.tolist(), annotations.labels.tolist(), annotations.crowd.tolist())
    return [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": label,
            "iscrowd": int(crowd),
        }
        for box, label, crowd in zip(*columns, strict=True)
    ]


def run_evaluator(
    evaluator: DatasetEvaluator,
    dataset: DetectionDataset,
    predictions: Mapping[int | str, Detections],
) -> Any:
    """What a detectron2 evaluator says about our detections.

    Args:
        evaluator: such as `COCOEvaluator`; its data set has to be registered in detectron2.
        dataset: the images.
        predictions: detections of every image by its id, as `detection.evaluation.predict` returns.

    Example::

        register_in_detectron2(["digits_test"])
        evaluator = COCOEvaluator("digits_test", tasks=("bbox",), output_dir=folder)
        results = run_evaluator(evaluator, load_dataset("digits_test"), predict(detector, batches))
    """
    evaluator.reset()
    for record in dataset.records:
        detections = predictions[record.image_id]
        instances = Instances((record.height, record.width))
        instances.pred_boxes = Boxes(detections.boxes.cpu())
        instances.pred_classes = detections.labels.cpu()
        instances.scores = detections.scores.cpu()
        entry = {"file_name": record.file_name, "image_id": record.image_id}
        evaluator.process([entry], [{"instances": instances}])
    return evaluator.evaluate()
