"""What a trained model says of images that belong to no data set.

Example::

    predictor = open_predictor(read_shipped("output/run"), device="auto", threshold=0.5)
    paths = find_images(["photos", "another.jpg"])
    for prediction in predict_images(predictor, paths, batch_size=4, unreadable=[]):
        print(prediction.path, prediction.detections)
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from ssod_imwa.classification import build as classification
from ssod_imwa.classification.data.catalog import is_in_files
from ssod_imwa.classification.data.datasets import ClassificationDataset, read_into_memory
from ssod_imwa.classification.data.images import open_images
from ssod_imwa.classification.export import trained_classifier
from ssod_imwa.data.batches import Part
from ssod_imwa.data.image_files import image_paths, image_size
from ssod_imwa.data.loader import build_test_batches
from ssod_imwa.data.streams import FileImages, MemoryImages
from ssod_imwa.detection.build import build_test_view
from ssod_imwa.detection.data.images import DetectionImages
from ssod_imwa.detection.data.records import Detections, ImageRecord
from ssod_imwa.detection.detectors.base import Detector
from ssod_imwa.detection.detectors.build import build_detector
from ssod_imwa.detection.evaluation import to_stored_image
from ssod_imwa.detection.pseudo_labels import filter_detections
from ssod_imwa.engine.device import pick_device
from ssod_imwa.errors import DataError, UserError
from ssod_imwa.runs.trained import TrainedModels

DETECTION_BATCH, CLASSIFICATION_BATCH = 4, 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        path: of the image.
        width, height: of the stored image, upright, in pixels.
        detections: boxes in its pixels, by falling score; None of a classifier.
        probabilities: float32 (C,), None of a detector.
    """

    path: Path
    width: int
    height: int
    detections: Detections | None = None
    probabilities: torch.Tensor | None = None


class Predictor(ABC):
    """A trained model with what it needs to look at image files.

    Attributes:
        classes: names in label order.
        batch_size: images at a time, if nobody asks for another number.
    """

    classes: tuple[str, ...]
    batch_size: int

    @abstractmethod
    def predict(self, paths: Sequence[Path]) -> list[Prediction]:
        """Of each image, in this order.

        Raises:
            DataError: an image cannot be read.
        """


class DetectionPredictor(Predictor):
    """A detector that sees images as the run's evaluation does.

    Args:
        detector: on its device.
        cfg: of its run.
        classes: names in label order.
        threshold: detections with a score above it count.
    """

    batch_size = DETECTION_BATCH

    def __init__(
        self, detector: Detector, cfg: CfgNode, classes: tuple[str, ...], *, threshold: float
    ) -> None:
        self.classes = classes
        self._detector = detector
        self._view = build_test_view(cfg)
        self.threshold = threshold

    def predict(self, paths: Sequence[Path]) -> list[Prediction]:
        records = [ImageRecord(str(path), str(path), *image_size(path)) for path in paths]
        batch = _one_batch(DetectionImages("images", records), self._view)
        views = batch.views["image"]
        device = next(self._detector.parameters()).device
        predictions = []
        for record, view, detections in zip(
            records,
            views,
            self._detector.detect([view.image.to(device) for view in views]),
            strict=True,
        ):
            sure = filter_detections(to_stored_image(detections, view, record), self.threshold)
            size = (record.width, record.height)
            predictions.append(Prediction(Path(record.file_name), *size, detections=sure))
        return predictions


class ClassificationPredictor(Predictor):
    """A classifier that sees images as the run's evaluation does.

    Args:
        model: in eval mode, on its device: images (B, 3, H, W) to logits (B, C) or (K, B, C).
        cfg: of its run.
        classes: names in label order.
        stored_size: edge in pixels at which its test images were in memory, which are not cropped;
            None of one that was tested on files.

    Raises:
        ConfigError: it sees cached features and no images.
    """

    batch_size = CLASSIFICATION_BATCH

    def __init__(
        self, model: nn.Module, cfg: CfgNode, classes: tuple[str, ...], *, stored_size: int | None
    ) -> None:
        classification.check_sees_images(cfg)
        self.classes = classes
        self._model = model
        self._cfg = cfg
        self._stored_size = stored_size

    @torch.no_grad()
    def predict(self, paths: Sequence[Path]) -> list[Prediction]:
        files = tuple(map(str, paths))
        labels = torch.zeros(len(files), dtype=torch.int64)
        dataset = ClassificationDataset("images", labels, self.classes, files=files)
        if self._stored_size is not None:
            for path in paths:
                _check_size(path, self._stored_size)
            dataset = read_into_memory(dataset)
        view = classification.build_test_view(self._cfg, dataset)
        device = next(self._model.parameters()).device
        batch = _one_batch(open_images(dataset, device), view)
        logits = self._model(batch.views["image"].to(device)).float()
        # Experts answer together by the mean of their logits, as in evaluation.
        probabilities = (logits.mean(0) if logits.ndim == 3 else logits).softmax(-1).cpu()
        return [
            Prediction(path, *image_size(path), probabilities=row)
            for path, row in zip(paths, probabilities, strict=True)
        ]


def open_predictor(trained: TrainedModels, *, device: str, threshold: float) -> Predictor:
    """The model that a finished run ships, or an exported one, ready to look at images.

    Args:
        trained: see `runs.trained.read_shipped`.
        device: as MODEL.DEVICE.
        threshold: detections with a score above it count; classifiers do not read it.

    Raises:
        UserError: the file does not say which classes it knows, or the device is not there.
    """
    cfg, target = trained.config, pick_device(device)
    classes = tuple(trained.content.get("classes") or ())
    if not classes:
        raise UserError(f"{trained.path} names no classes (take a run's model_final.pth)")
    if cfg.TASK == "classification":
        model = trained_classifier(cfg, trained).to(target)
        return ClassificationPredictor(model, cfg, classes, stored_size=_stored_size(trained))
    detector = build_detector(cfg, len(classes))
    detector.load_weights(str(trained.path))
    return DetectionPredictor(detector.to(target).eval(), cfg, classes, threshold=threshold)


def _stored_size(trained: TrainedModels) -> int | None:
    """See `ClassificationPredictor`; of older files, which do not say it, by the data's names."""
    if "stored_size" in trained.content:
        return trained.content["stored_size"]
    cfg = trained.config
    in_files = all(is_in_files(name) for name in cfg.DATASETS.TRAIN)
    return cfg.CLS.INPUT.SIZE if cfg.CLS.INPUT.IN_MEMORY or not in_files else None


def predict_images(
    predictor: Predictor, paths: Sequence[Path], *, batch_size: int, unreadable: list[str]
) -> Iterator[Prediction]:
    """Predictions in the order of the paths, without the images that cannot be read.

    Args:
        predictor: the model.
        paths: of image files.
        batch_size: images at a time.
        unreadable: receives a line for each image that is left out.
    """
    for first in range(0, len(paths), batch_size):
        batch = paths[first : first + batch_size]
        try:
            yield from predictor.predict(batch)
            continue
        except DataError as error:
            if len(batch) == 1:
                unreadable.append(str(error))
                continue
        for path in batch:  # the others of the batch are whole
            yield from predict_images(predictor, [path], batch_size=1, unreadable=unreadable)


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The images that files and folders (with all below them) name, each once, in order.

    Raises:
        DataError: a source does not exist, or there is no image.
    """
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            paths += image_paths(source)
        elif source.is_file() or source.is_symlink():
            paths.append(source)
        else:
            raise DataError(f"{source} does not exist (must be an image or a folder of images)")
    if not paths:
        raise DataError(f"{', '.join(map(str, sources))}: no image is there")
    return list({os.path.abspath(path): path for path in paths}.values())


def _check_size(path: Path, size: int) -> None:
    width, height = image_size(path)
    if (width, height) != (size, size):
        raise DataError(
            f"image {path} is {width} x {height} pixels (must be {size} x {size}, as the model was "
            "trained on; resize it)"
        )


def _one_batch(images: FileImages | MemoryImages, view: Any) -> Part:
    (batch,) = build_test_batches(images, view, batch_size=len(images))
    return batch
