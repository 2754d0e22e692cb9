"""Predictions as files: COCO JSON, CSV and pictures."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ssod_imwa.analysis.predicting import Prediction
from ssod_imwa.data.image_files import read_image
from ssod_imwa.engine.checkpoint.atomic import make_room, write_output
from ssod_imwa.errors import writing
from ssod_imwa.visualization.pictures import draw_detections

DETECTION_COLUMNS = ("file", "class", "score", "x1", "y1", "x2", "y2")
PICTURE_QUALITY = 90  # of JPEG; text stays sharp


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that names of images in files are relative to."""
    return Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))


def write_detections(
    predictions: Iterable[Prediction],
    output: Path,
    *,
    root: Path,
    classes: Sequence[str],
    pictures: bool,
) -> tuple[int, int]:
    """Write detections.csv as they come, then annotations.json, and pictures if asked for.

    `annotations.json` is a COCO data set with a "score" in each annotation, which labeling tools
    and `coco:annotations.json:FOLDER` read.

    Args:
        predictions: of a detector.
        output: folder, which exists.
        root: names of images are relative to it.
        classes: names in label order; category ids count from 1.
        pictures: draw each image with its boxes into output/pictures.

    Returns:
        Numbers of images and of detections.

    Raises:
        OutputError: a file cannot be written.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with _table(output / "detections.csv", DETECTION_COLUMNS) as write_row:
        for prediction in predictions:
            name = _name(prediction, root)
            size = {"width": prediction.width, "height": prediction.height}
            images.append({"id": len(images) + 1, "file_name": name, **size})
            for label, score, corners in _rows(prediction):
                write_row([name, classes[label], score, *corners])
                annotation = {"id": len(annotations) + 1, "image_id": len(images)}
                box = _coco_box(label, score, corners)
                annotations.append({**annotation, **box})
            if pictures:
                suffix = "" if name.lower().endswith(".jpg") else ".jpg"
                _draw(prediction, output / "pictures" / (name + suffix), classes)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_output(output / "annotations.json", json.dumps(content).encode())
    return len(images), len(annotations)


def write_classes(
    predictions: Iterable[Prediction], output: Path, *, root: Path, classes: Sequence[str]
) -> int:
    """Write classes.csv: each image's most probable class and the probabilities of all.

    Returns:
        Number of images.

    Raises:
        OutputError: the file cannot be written.
    """
    images = 0
    header = ["file", "class", "probability", *(f"p({name})" for name in classes)]
    with _table(output / "classes.csv", header) as write_row:
        for prediction in predictions:
            assert prediction.probabilities is not None  # of a classifier
            values = [round(x, 6) for x in prediction.probabilities.tolist()]
            label = int(prediction.probabilities.argmax())
            write_row([_name(prediction, root), classes[label], values[label], *values])
            images += 1
    return images


@contextmanager
def _table(path: Path, header: Sequence[str]) -> Iterator[Callable[[Sequence[object]], None]]:
    """A function that writes a row of a CSV file.

    Only what writes is inside `writing`: rows come from a model, whose errors are other ones.
    """
    with writing(path):
        file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed below
    table = csv.writer(file)

    def write_row(row: Sequence[object]) -> None:
        with writing(path):
            table.writerow(row)

    try:
        write_row(header)
        yield write_row
    finally:
        with writing(path):
            file.close()


def _name(prediction: Prediction, root: Path) -> str:
    return Path(os.path.abspath(prediction.path)).relative_to(root).as_posix()


def _rows(prediction: Prediction) -> list[tuple[int, float, list[float]]]:
    """Label, score and rounded corners of each detection."""
    detections = prediction.detections
    assert detections is not None  # of a detector
    rows = zip(
        detections.labels.tolist(),
        detections.scores.tolist(),
        detections.boxes.tolist(),
        strict=True,
    )
    return [
        (label, round(score, 4), [round(x, 2) for x in corners]) for label, score, corners in rows
    ]


def _coco_box(label: int, score: float, corners: list[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    width, height = round(x2 - x1, 2), round(y2 - y1, 2)
    return {
        "category_id": label + 1,
        "bbox": [x1, y1, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": score,
    }


def _draw(prediction: Prediction, path: Path, classes: Sequence[str]) -> None:
    detections = prediction.detections
    assert detections is not None  # of a detector
    picture = draw_detections(
        read_image(str(prediction.path)),
        detections.boxes,
        detections.labels,
        classes,
        scores=detections.scores,
    )
    make_room(path)
    with writing(path):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=PICTURE_QUALITY)
